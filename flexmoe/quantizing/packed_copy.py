"""A packed copy of a 16-bit checkpoint for runs: made once below the offload directory, and used by all later ones.

Its name says what it is a copy of and in which format, by content, so that another model or format never meets it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

from cost_model.model.packed_format import PackedFormat
from cost_model.model.packing import packed_as
from flexmoe.checkpoint.weights_hash import weights_hash
from flexmoe.errors import StorageError, UsageError
from flexmoe.models.loader import Model, load_model
from flexmoe.models.registry import family
from flexmoe.quantizing.quantize import quantize
from policies.common.memory_units import in_units
from policies.common.option_names import option

log = logging.getLogger(__name__)
#: Below the offload directory.
DIRECTORY = "packed"


def packed_copy(model: Model, format: str, offload_dir: Path, *, dtype: str = "auto", bar: bool = False) -> Model:
    """The model with its weights packed; itself, where they are packed in that format already.

    What was begun by a run that was stopped is resumed.

    Args:
        model: of 16-bit or 32-bit weights; names, tokenizer and generation config stay its own.
        format: ``int4``, ``int8``, ``fp8`` or ``mxfp4``.
        offload_dir: the copy lies below it.
        dtype: compute dtype that is asked for.
        bar: draw a bar on stderr.

    Raises:
        InfeasibleError: the model is packed in another format.
        UsageError: it has random weights, the format has no group for its widths, or another run is making the copy.
        StorageError: the directory cannot be made, or its disk has no room.
        DataError: a weight is not finite, or the copy is damaged.
    """
    packed = packed_as(model.arch, format).packed
    if packed is None or model.arch.packed is not None:
        return model
    if model.checkpoint is None or model.directory is None:
        raise UsageError(f"random weights are not packed; leave {option('compress_weight', format)} out")
    directory = offload_dir / DIRECTORY / _name(model, packed)
    if directory.exists():
        log.info("weights: packed before in %s: %s", packed.describe(), directory)
    else:
        _make(model, packed, directory, bar)
    found = load_model(str(directory), dtype=dtype)
    arch = replace(found.arch, name=model.arch.name)
    return replace(
        found,
        arch=arch,
        family=family(arch, found.config),
        generation_config=model.generation_config,
        directory=model.directory,
    )


def _make(model: Model, packed: PackedFormat, directory: Path, bar: bool) -> None:
    log.info("weights: packing them once in %s; later runs read them from %s", packed.describe(), directory)
    try:
        made = quantize(str(model.directory), directory, packed.name, packed.columns, bar=bar)
    except StorageError as error:
        raise StorageError(f"{error}; the directory is below {option('offload_dir')}") from error
    log.info("weights: %s of %s", in_units(made.packed_bytes), in_units(made.source_bytes))


def _name(model: Model, packed: PackedFormat) -> str:
    """What a copy is called: for people, and by what it is made of."""
    tensors = () if model.checkpoint is None else model.checkpoint.tensors.values()
    content = json.dumps([weights_hash(tensors), model.config, repr(packed)], sort_keys=True)
    shown = re.sub(r"[^\w.-]+", "_", Path(model.arch.name).name) or model.arch.model_type
    return f"{shown}-{packed.name}-{packed.columns}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
