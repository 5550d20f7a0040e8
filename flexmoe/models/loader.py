"""From a model name to a checked shape and a source of weights; nothing heavy is allocated here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cost_model.model.arch import ModelArch
from cost_model.model.families import shape_fields
from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.checkpoint.files import read_json_object
from flexmoe.checkpoint.unit_layout import FLOAT32_ROLES, Part
from flexmoe.errors import DataError, Faults, InputMissingError, UsageError
from flexmoe.formats.beside import UNREAD, check_beside
from flexmoe.formats.packed_matrix import SEPARATOR
from flexmoe.kernels.family import Family
from flexmoe.models.common.names import decoder_tensors
from flexmoe.models.registry import FAMILIES, family
from flexmoe.weights.recast import Rest
from flexmoe.weights.sources import CheckpointSource, DummySource, WeightSource
from policies.common.directories import hub_directory
from policies.common.option_names import option

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: A model of the hub: its name, with its owner or without.
_HUB_ID = re.compile(r"[\w.-]*\w[\w.-]*(/[\w.-]+)?", re.ASCII)
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that can be run: its shape, its mathematics and where its weights come from.

    Attributes:
        arch: the shape; ``dtype_bytes`` is what is at rest.
        family: the family's mathematics.
        stored_dtype: dtype at rest; weights of another one are cast when they are read.
        config, generation_config: as in the checkpoint; empty for a dummy known by name.
        directory: the checkpoint's directory; None for a dummy known by name.
        checkpoint: None for a dummy.
    """

    arch: ModelArch
    family: Family
    stored_dtype: torch.dtype
    config: dict[str, Any]
    generation_config: dict[str, Any]
    directory: Path | None
    checkpoint: Checkpoint | None

    def grouped(self, experts_per_unit: int | None) -> Model:
        """The same model with units of so many experts; None leaves it as it is."""
        arch = self.arch.grouped(experts_per_unit)
        return self if arch is self.arch else dataclasses.replace(self, arch=arch, family=family(arch, self.config))

    def source(self, offload_dir: Path, dtype: torch.dtype | None = None) -> WeightSource:
        """Where the weights come from, to be computed with in ``dtype``, by default the stored one."""
        names = () if self.checkpoint is None else self.checkpoint.tensors
        parts, experts = self.family.parts(names), self.family.expert_parts(names)
        if self.checkpoint is None:
            return DummySource(parts, self.stored_dtype, offload_dir, experts=experts)
        return CheckpointSource(self.checkpoint, parts, Rest.of(self.stored_dtype, dtype or self.stored_dtype), experts)


def load_model(model: str, load_format: str = "auto", dtype: str = "auto") -> Model:
    """Find and check a model before any weight is loaded.

    Args:
        model: a checkpoint directory, a hub id, or with ``dummy`` the name of a known shape.
        load_format: ``auto`` reads safetensors; ``dummy`` fills random weights.
        dtype: compute dtype that is asked for.

    Raises:
        UsageError: unknown load format, or a dummy of an unknown shape.
        InputMissingError: no such directory, and the hub cannot be reached.
        DataError: the checkpoint is incomplete, corrupt or of a family that does not run.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"unknown load format {load_format!r}: choose {' or '.join(LOAD_FORMATS)}")
    path = Path(model)
    if load_format == "dummy":
        arch = ModelArch.from_dir(path) if path.is_dir() else ModelArch.from_name(model)
        if arch.packed is not None:
            raise UsageError(
                f"{model!r} has packed weights ({arch.packed.describe()}), which are not made at random: give a config.json "
                "without quantization_config"
            )
        return _dummy(arch, path if path.is_dir() else None)
    _refuse_an_unknown_family(path, model)
    checkpoint = Checkpoint.open(path if path.exists() else _from_hub(model))
    checkpoint = decoder_of(checkpoint)
    math = _mathematics(checkpoint.config, model)
    parts = parts_of(checkpoint, math)
    check_tensors(checkpoint, math, parts)
    check_scales(checkpoint, math, parts)
    stored = stored_dtype(checkpoint, parts, dtype)
    arch = dataclasses.replace(math.arch, dtype_bytes=stored.itemsize)
    return Model(
        arch=arch,
        family=family(arch, checkpoint.config),
        stored_dtype=stored,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        directory=checkpoint.directory,
        checkpoint=checkpoint,
    )


def read_family(config: Mapping[str, Any], name: str, faults: Faults | None = None) -> Family | None:
    """The family of a config.

    Args:
        name: of the model, for messages.
        faults: keeps what would be raised; the result is None then.

    Raises:
        DataError: the config asks for something that cannot be run.
    """
    own = Faults(keep=True)
    with own.step():
        shape_fields(config, own)
    math = None
    if not own.found:
        with own.step():
            math = _mathematics(config, name)
    faults = faults or Faults()
    for fault in own.found:
        with faults.step():
            raise DataError(f"{name} cannot be run: {fault}") from fault
    return math


def decoder_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the tensors that belong to other parts of a larger model, and under the names of a decoder alone."""
    return dataclasses.replace(checkpoint, tensors=decoder_tensors(checkpoint.tensors, checkpoint.config))


def parts_of(checkpoint: Checkpoint, math: Family) -> list[Part]:
    """Where a checkpoint should have what a family's units consist of."""
    return [part for own in math.parts(checkpoint.tensors).values() for part in own]


def check_tensors(checkpoint: Checkpoint, math: Family, parts: Iterable[Part], faults: Faults | None = None) -> None:
    """Hold the tensors against what the config asks for.

    Args:
        parts: of the checkpoint.
        faults: keeps what would be raised.

    Raises:
        DataError: they are others.
    """
    dtypes = {part.tensor: part.dtypes for part in parts if part.dtypes}
    unread = UNREAD if dtypes else ()
    checkpoint.check(math.expected_tensors(checkpoint.tensors), FAMILIES, dtypes, unread, faults)


def check_scales(checkpoint: Checkpoint, math: Family, parts: Iterable[Part]) -> None:
    """Read what lies beside packed numbers, and refuse what cannot be computed with.

    Raises:
        DataError, StorageError: as `check_beside`.
    """
    if math.arch.packed is not None:
        scales = [checkpoint.tensors[part.tensor] for part in parts if part.role.endswith(f"{SEPARATOR}scale")]
        check_beside(scales, checkpoint.tensors.values(), math.arch.packed.columns)


def _mathematics(config: Mapping[str, Any], name: str) -> Family:
    return family(ModelArch.from_config(config, name=name), config)


def compute_dtype(name: str, model: Model, device: torch.device) -> torch.dtype:
    """The dtype to compute in: as named, or for ``auto`` the stored one (fp16 where the GPU has no bf16).

    Raises:
        UsageError: unknown name, or bfloat16 on a GPU without it.
    """
    no_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    if name == "auto":
        return torch.float16 if no_bf16 and model.stored_dtype == torch.bfloat16 else model.stored_dtype
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    if name == "bfloat16" and no_bf16:
        raise UsageError(f"this GPU has no bfloat16; use {option('dtype', 'float16')}")
    return DTYPES[name]


def _dummy(arch: ModelArch, directory: Path | None) -> Model:
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    return Model(
        arch=arch,
        family=family(arch),
        stored_dtype=dtypes[arch.dtype_bytes],
        config={},
        generation_config={},
        directory=directory,
        checkpoint=None,
    )


def stored_dtype(checkpoint: Checkpoint, parts: Iterable[Part], asked: str = "auto") -> torch.dtype:
    """The dtype of the most bytes of weights; of several, all are float32 where that is asked for: no other holds each of them."""
    names = {part.tensor for part in parts if not part.dtypes and part.role not in FLOAT32_ROLES}
    sizes: Counter[torch.dtype] = Counter()
    for info in (checkpoint.tensors[name] for name in sorted(names)):
        sizes[info.dtype if info.dtype in DTYPES.values() else torch.float32] += info.nbytes
    return torch.float32 if len(sizes) > 1 and asked == "float32" else max(sizes, key=sizes.__getitem__)


def _refuse_an_unknown_family(directory: Path, name: str) -> None:
    """From the config alone: before the headers of thousands of tensors are read, or their files fetched."""
    config = directory / "config.json"
    if os.path.isfile(config):
        read_family(read_json_object(config), name)


def _from_hub(name: str) -> Path:
    """Directory of a hub model's files; the weights are fetched only for a family that is known."""
    _refuse_an_unknown_family(_fetch(name, ["config.json"]), name)
    return _fetch(name, ["*.json", "*.safetensors", "tokenizer*", "*.jinja"])


def _fetch(name: str, files: list[str]) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise InputMissingError(
            f"there is no directory {name!r}; give one that holds a checkpoint, or a hub id (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=files, cache_dir=hub_directory()))
    except Exception as e:  # the hub raises a dozen unrelated types for "not there" and "no network"
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputMissingError(f"{name!r} is no local directory, and the hub did not provide it: {reason}") from None
