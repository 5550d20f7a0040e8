"""Checkpoints that are headers alone: any shape in any layout, in files with holes for weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch

from cost_model.model.arch import ModelArch
from flexmoe.checkpoint.safetensors import dtype_label
from flexmoe.checkpoint.unit_layout import FLOAT32_ROLES, Part
from flexmoe.models.registry import family

#: Tensors by name: dtype and shape.
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def tensors_of(config: Mapping, *, stacked: bool = False) -> Tensors:
    """What a checkpoint of a config has; ``stacked``: the experts of a layer in one tensor."""
    math = family(ModelArch.from_config(config), config)
    on_disk = (f"model.layers.0.{math.names.packed_gate_up}",) if stacked else ()
    parts = [part for own in math.parts(on_disk).values() for part in own]
    return {p.tensor: (_dtype(p, math.arch), p.whole or p.shape) for p in parts}


def _dtype(part: Part, arch: ModelArch) -> torch.dtype:
    """One that the part may have; of a scale, one of the bytes that the format says."""
    if not part.dtypes:
        return torch.float32 if part.role in FLOAT32_ROLES else torch.bfloat16
    fits = (d for d in part.dtypes if d.itemsize == arch.packed.scale_bytes)
    return next(fits, part.dtypes[0]) if part.role.endswith("scale") else part.dtypes[0]


def write_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file with a hole where the weights are."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_label(dtype), "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


def write_headers(
    directory: Path,
    config: Mapping,
    *,
    stacked: bool = False,
    shards: int = 1,
    edit: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Path:
    """A checkpoint directory.

    Args:
        edit: what is written of the tensors that belong there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = edit(tensors_of(config, stacked=stacked))
    if shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    names, weight_map = list(tensors), {}
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = names[number::shards]
        write_file(directory / shard, {name: tensors[name] for name in own})
        weight_map |= dict.fromkeys(own, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
