"""A checkpoint's directory and its shards: all of it under its name, or nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flexmoe.errors import StorageError, UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_SHARD_BYTES = 200_000_000

Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A directory to write a checkpoint into. It gets its name at the end; if anything fails, it is removed.

    Raises:
        UsageError: `out` is already there, and is no empty directory.
        StorageError: writing failed.
    """
    unfinished = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
            raise UsageError(f"{str(out)!r} already exists: remove it or choose another directory")
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"writing the checkpoint {str(out)!r} failed: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_weights(
    directory: Path,
    shapes: Shapes,
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write safetensors shards, with an index if there are several. One shard at a time is in memory.

    Args:
        shapes: of every tensor by name, in the order of the shards.
        tensor: makes the tensor of a name, of `dtype`. No two tensors of a shard share memory.
        shard_bytes: no shard is larger than this, unless it holds a single tensor.
        dtypes: of tensors that have another one.
    """
    sizes = {name: math.prod(shape) * dtypes.get(name, dtype).itemsize for name, shape in shapes.items()}
    shards = list(_cut(sizes, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        # not bound to a name: one shard must be gone from memory before the next is made
        save_file({name: tensor(name) for name in names}, directory / file, metadata={"format": "pt"})
        # safetensors makes its files private to the user; the directory's other files follow the umask
        shutil.copymode(directory / "config.json", directory / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_index(directory, shapes, sum(sizes.values()), weight_map)


def _write_index(directory: Path, shapes: Shapes, total_bytes: int, weight_map: Mapping[str, str]) -> None:
    parameters = sum(math.prod(shape) for shape in shapes.values())
    metadata = {"total_parameters": parameters, "total_size": total_bytes}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _cut(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Cut names, with their bytes, into runs of at most `shard_bytes`, or of a single larger tensor."""
    names: list[str] = []
    used_bytes = 0
    for name, nbytes in sizes.items():
        if names and used_bytes + nbytes > shard_bytes:
            yield names
            names, used_bytes = [], 0
        names.append(name)
        used_bytes += nbytes
    yield names
