"""The shards of a checkpoint: its index, held against the header of each of them."""

from pathlib import Path
from typing import Any

from flexmoe.checkpoint.files import read_json_object
from flexmoe.checkpoint.safetensors import TensorInfo, read_tensors
from flexmoe.errors import DataError, Faults

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Last words of names of what a module keeps beside its weights. All of it is computed anew here.
_BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids", "masked_bias")


def is_buffer(name: str) -> bool:
    """Whether a tensor is one of those that are computed anew."""
    return name.rsplit(".", 1)[-1] in _BUFFERS


def read_sharded(index: Path, faults: Faults) -> dict[str, TensorInfo]:
    """The tensors of all shards by name.

    Args:
        index: the file that says which shard has which tensor.
        faults: get what is wrong with the index, and the first fault of each shard.

    Raises:
        DataError: the index or a shard is malformed or missing, or they contradict each other.
        InputMissingError, StorageError: a file may not or cannot be read.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"the index {str(index)!r} has no table 'weight_map' of tensors and their shards")
    for name, shard in weight_map.items():
        _check_shard_name(index, name, shard)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        with faults.step():
            tensors.update(_read_shard(index, shard, weight_map))
    return tensors


def _read_shard(index: Path, shard: str, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    path = index.parent / shard
    found = read_tensors(path)
    for name in found:
        if weight_map.get(name) != shard and not is_buffer(name):
            where = f"places it in {weight_map[name]!r}" if name in weight_map else "does not list it"
            raise DataError(
                f"tensor {name!r} is in shard {str(path)!r}, but the index {INDEX_FILE} {where}: "
                f"the index and the shards are probably from different downloads"
            )
    for name, place in weight_map.items():
        if place == shard and name not in found and not is_buffer(name):
            raise DataError(
                f"the index {str(index)!r} places tensor {name!r} in {shard!r}, but that shard does not contain it: "
                f"the index and the shards are probably from different downloads"
            )
    return found


def _check_shard_name(index: Path, name: str, shard: Any) -> None:
    """Only a plain file name beside the index is followed: a downloaded index must not reach other directories."""
    plain = isinstance(shard, str) and shard.isprintable() and len(shard.encode()) <= 255
    if not plain or any(mark in shard for mark in ("/", "\\", "..")) or not shard.endswith(".safetensors"):
        raise DataError(
            f"the index {str(index)!r} places tensor {name!r} in {shard!r}, which is not the plain name of a "
            f".safetensors file: path separators and '..' are refused, the index is damaged or not to be trusted"
        )
