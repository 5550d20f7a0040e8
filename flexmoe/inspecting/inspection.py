"""What a checkpoint directory is, whether a run would take it, and why not: from its configs and headers alone.

Every check is one of the run's own, in the run's own words; here none of them ends the others.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cost_model.model.arch import ModelArch
from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.checkpoint.generation_config import SamplingDefaults
from flexmoe.errors import Faults, FlexMoEError
from flexmoe.inspecting.contents import Stored, stopped_downloads, stored_by_kind
from flexmoe.inspecting.text_files import TextFiles, text_files
from flexmoe.kernels.family import Family
from flexmoe.models.loader import check_scales, check_tensors, decoder_of, parts_of, read_family, stored_dtype
from flexmoe.quantizing.checksums import check_checkpoint
from flexmoe.text.tokenizer import eos_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What was found.

    Args:
        directory: of the checkpoint.
        model_type: as its config names it; None where it does not.
        arch: the shape, with the dtype that is stored; None where the config cannot be run.
        stored: tensors by kind (`contents.stored_by_kind`).
        files: of weights that could be read.
        texts: tokenizer and chat template.
        faults: every reason for which a run would refuse it, in the words of the run and in its order.
        stopped: files that a download has begun and not finished.
        scales_read: the scales of packed matrices were read, too.
    """

    directory: Path
    model_type: Any
    arch: ModelArch | None
    stored: dict[str, Stored]
    files: int
    texts: TextFiles
    faults: tuple[FlexMoEError, ...]
    stopped: int
    scales_read: bool

    @property
    def runs(self) -> bool:
        """Whether a run takes it."""
        return not self.faults


def inspect(directory: str | os.PathLike[str], *, scales: bool = False, checksums: bool = False) -> Inspection:
    """Look at a checkpoint without loading weights.

    Args:
        directory: of the checkpoint.
        scales: read the scales of packed matrices, too, as a run does: some hundredths of the weights' bytes.
        checksums: read all weights, and hold them against the hashes that `flexmoe.quantize` has written beside them.

    Raises:
        InputMissingError, DataError: there is no such directory. What is wrong with its contents is in the result.
    """
    root, faults, opened = Path(directory), Faults(keep=True), Faults(keep=True)
    checkpoint = Checkpoint.open(root, opened)
    # A run looks at the config before it looks at other files.
    math = read_family(checkpoint.config, str(directory), faults) if checkpoint.config else None
    faults.found += opened.found
    with faults.step():
        SamplingDefaults.of(checkpoint.generation_config)
    with faults.step():
        eos_ids(checkpoint.generation_config, checkpoint.config, None)
    arch = None if math is None else math.arch
    if math is not None and not opened.found:
        arch = _check_weights(decoder_of(checkpoint), math, faults, scales=scales)
    if checksums:
        with faults.step():
            check_checkpoint(root)
    return Inspection(
        directory=root,
        model_type=checkpoint.config.get("model_type"),
        arch=arch,
        stored=stored_by_kind(checkpoint, math),
        files=len({info.path for info in checkpoint.tensors.values()}),
        texts=text_files(root),
        faults=tuple(faults.found),
        stopped=stopped_downloads(root),
        scales_read=scales,
    )


def _check_weights(checkpoint: Checkpoint, math: Family, faults: Faults, *, scales: bool) -> ModelArch:
    """Hold all tensors against the config; the shape with the dtype that is stored, where they are right."""
    parts, before = parts_of(checkpoint, math), len(faults.found)
    check_tensors(checkpoint, math, parts, faults)
    if len(faults.found) > before:
        return math.arch
    if scales:
        with faults.step():
            check_scales(checkpoint, math, parts)
    dtype: torch.dtype = stored_dtype(checkpoint, parts)
    return dataclasses.replace(math.arch, dtype_bytes=dtype.itemsize)
