"""A Hugging Face safetensors directory as a table of byte extents, checked before any weight byte is read.

A checkpoint comes from elsewhere, so a file is taken for what its bytes prove, not for what its name says: every
size, offset and name is checked, and each fault is one sentence that names the file, the tensor and the likely cause.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cost_model.model.families import STORED_AS
from flexmoe.checkpoint.files import INCOMPLETE, os_errors, read_json_object
from flexmoe.checkpoint.safetensors import TensorInfo, read_tensors
from flexmoe.errors import DataError, InputMissingError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
#: Last words of names of what a module keeps beside its weights. All of it is computed anew here.
_BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids", "masked_bias")
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint directory and its configuration; holds no open file and no weights."""

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "Checkpoint":
        """Read the configuration, the index and every header, and check them against each other and the file sizes.

        Args:
            directory: holds `config.json` and either `model.safetensors` or shards with their index. Where both are
                there the single file wins, as in transformers.

        Raises:
            InputMissingError: the directory or its `config.json` does not exist or may not be read.
            DataError: anything in it is malformed, incomplete or contradictory.
            StorageError: the operating system failed to read a file.
        """
        root = Path(directory)
        with os_errors(root):
            if not root.exists():
                raise InputMissingError(f"the checkpoint directory {str(root)!r} does not exist")
            if not root.is_dir():
                raise DataError(
                    f"{str(root)!r} is not a directory, but a checkpoint is one, of config.json and safetensors"
                )
            names = sorted(os.listdir(root))
        if "config.json" not in names:
            raise InputMissingError(f"{str(root)!r} has no config.json, so it is not a checkpoint or {INCOMPLETE}")
        config = read_json_object(root / "config.json")
        generation = "generation_config.json"
        generation_config = read_json_object(root / generation) if generation in names else {}
        if _SINGLE_FILE in names:
            tensors = read_tensors(root / _SINGLE_FILE)
        elif _INDEX_FILE in names:
            tensors = _read_sharded(root)
        else:
            raise DataError(_no_weights_sentence(root, names))
        if not tensors:
            raise DataError(f"the checkpoint {str(root)!r} has no tensors at all, so {INCOMPLETE}")
        return cls(directory=root, config=config, generation_config=generation_config, tensors=tensors)

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        families: Iterable[str],
        dtypes: Mapping[str, Sequence[torch.dtype]] = MappingProxyType({}),
        unread: Sequence[str] = (),
    ) -> None:
        """Hold the tensors against what the model's configuration asks for.

        Names that are not expected are an error if they belong to a layer (the configuration then describes another
        model); buffers of old checkpoints, such as `rotary_emb.inv_freq`, are not.

        Args:
            expected: the shape of every tensor that the model needs, by its name on disk.
            families: the model types that can be read, for the sentence.
            dtypes: of tensors that are not floats of 16 bits and more, by name.
            unread: last words of names that may be there and are not read.

        Raises:
            DataError: a tensor is missing, left over, of another shape, or of a dtype that it may not have.
        """
        missing = [name for name in expected if name not in self.tensors]
        extra = [
            name
            for name in self.tensors
            if name not in expected and _is_layer_weight(name) and name.rsplit(".", 1)[-1] not in unread
        ]
        if missing or extra:
            found = [f"{_some(missing)} missing"] * bool(missing) + [f"{_some(extra)} unexpected"] * bool(extra)
            raise DataError(
                f"the tensors of {str(self.directory)!r} are not those that its config.json describes "
                f"({' and '.join(found)}): supported are {', '.join(sorted(families))} with the names of the hub or packed "
                f"by transformers; the config.json may belong to another model, the checkpoint may be quantized, or "
                f"{INCOMPLETE}"
            )
        for name, shape in expected.items():
            info = self.tensors[name]
            known = dtypes.get(name, ())
            if known and info.dtype not in known:
                raise DataError(
                    f"tensor {name!r} in {str(info.path)!r} is {_dtype_name(info.dtype)}, but the quantization_config asks for "
                    f"{' or '.join(map(_dtype_name, known))}: they belong to different checkpoints"
                )
            if not known and info.dtype not in _WEIGHT_DTYPES:
                raise DataError(
                    f"tensor {name!r} in {str(info.path)!r} is {_dtype_name(info.dtype)}, but weights must be {STORED_AS}: "
                    f"it looks quantized, and config.json has no quantization_config for it"
                )
            if info.shape != tuple(shape):
                raise DataError(
                    f"tensor {name!r} in {str(info.path)!r} has shape {list(info.shape)}, but config.json asks for "
                    f"{list(shape)}: the config.json and the weights probably belong to different models"
                )


def _is_layer_weight(name: str) -> bool:
    return name.startswith("model.layers.") and not _is_buffer(name)


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _BUFFERS


def _some(names: list[str]) -> str:
    """The count and the first three names, so that thousands of names stay one sentence."""
    listed = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} ({listed}{', …' if len(names) > 3 else ''})"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no_weights_sentence(root: Path, names: list[str]) -> str:
    if any(name.endswith(".safetensors") for name in names):
        return f"{str(root)!r} has safetensors shards but no {_INDEX_FILE}, so {INCOMPLETE}"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            f"{str(root)!r} has its weights only as pickles (.bin, .pt), which are never loaded because they can run "
            f"code: convert to safetensors with save_pretrained, or download the safetensors files"
        )
    return f"{str(root)!r} has neither {_SINGLE_FILE} nor {_INDEX_FILE}, so {INCOMPLETE}"


def _read_sharded(root: Path) -> dict[str, TensorInfo]:
    index = root / _INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"the index {str(index)!r} has no table 'weight_map' of tensors and their shards")
    for name, shard in weight_map.items():
        _check_shard_name(index, name, shard)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        in_shard = read_tensors(root / shard)
        for name in in_shard:
            if weight_map.get(name) != shard and not _is_buffer(name):
                where = f"places it in {weight_map[name]!r}" if name in weight_map else "does not list it"
                raise DataError(
                    f"tensor {name!r} is in shard {str(root / shard)!r}, but the index {_INDEX_FILE} {where}: "
                    f"the index and the shards are probably from different downloads"
                )
        tensors.update(in_shard)
    for name, shard in weight_map.items():
        if name not in tensors and not _is_buffer(name):
            raise DataError(
                f"the index {str(index)!r} places tensor {name!r} in {shard!r}, but that shard does not contain it: "
                f"the index and the shards are probably from different downloads"
            )
    return tensors


def _check_shard_name(index: Path, name: str, shard: Any) -> None:
    """Only a plain file name beside the index is followed: a downloaded index must not reach other directories."""
    plain = isinstance(shard, str) and shard.isprintable() and len(shard.encode()) <= 255
    if not plain or any(mark in shard for mark in ("/", "\\", "..")) or not shard.endswith(".safetensors"):
        raise DataError(
            f"the index {str(index)!r} places tensor {name!r} in {shard!r}, which is not the plain name of a "
            f".safetensors file: path separators and '..' are refused, the index is damaged or not to be trusted"
        )
