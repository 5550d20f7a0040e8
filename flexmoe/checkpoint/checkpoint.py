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
from flexmoe.checkpoint.foreign import no_config_sentence, no_weights_sentence
from flexmoe.checkpoint.safetensors import TensorInfo, read_tensors
from flexmoe.checkpoint.shards import INDEX_FILE, SINGLE_FILE, is_buffer, read_sharded
from flexmoe.errors import DataError, Faults, InputMissingError

_CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint directory and its configuration; holds no open file and no weights."""

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, directory: str | os.PathLike[str], faults: Faults | None = None) -> "Checkpoint":
        """Read the configuration, the index and every header, and check them against each other and the file sizes.

        Args:
            directory: holds `config.json` and either `model.safetensors` or shards with their index. Where both are
                there the single file wins, as in transformers.
            faults: keeps what would be raised, but that there is no such directory; what could be read is there then.

        Raises:
            InputMissingError: the directory or its `config.json` does not exist or may not be read.
            DataError: anything in it is malformed, incomplete or contradictory.
            StorageError: the operating system failed to read a file.
        """
        faults = faults or Faults()
        root, names = Path(directory), _listing(Path(directory))
        config, generation_config, tensors = {}, {}, dict[str, TensorInfo]()
        with faults.step():
            if _CONFIG_FILE not in names:
                raise InputMissingError(no_config_sentence(root, names))
            config = read_json_object(root / _CONFIG_FILE)
        with faults.step():
            generation_config = read_json_object(root / _GENERATION_FILE) if _GENERATION_FILE in names else {}
        with faults.step():
            if SINGLE_FILE in names:
                tensors = read_tensors(root / SINGLE_FILE)
            elif INDEX_FILE in names:
                tensors = read_sharded(root / INDEX_FILE, faults)
            elif _CONFIG_FILE in names:  # where there is neither, one sentence says it
                raise DataError(no_weights_sentence(root, names))
            if not tensors and not faults.found:
                raise DataError(f"the checkpoint {str(root)!r} has no tensors at all, so {INCOMPLETE}")
        return cls(directory=root, config=config, generation_config=generation_config, tensors=tensors)

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        families: Iterable[str],
        dtypes: Mapping[str, Sequence[torch.dtype]] = MappingProxyType({}),
        unread: Sequence[str] = (),
        faults: Faults | None = None,
    ) -> None:
        """Hold the tensors against what the model's configuration asks for.

        Names that are not expected are an error if they belong to a layer (the configuration then describes another
        model); buffers of old checkpoints, such as `rotary_emb.inv_freq`, are not.

        Args:
            expected: the shape of every tensor that the model needs, by its name on disk.
            families: the model types that can be read, for the sentence.
            dtypes: of tensors that are not floats of 16 bits and more, by name.
            unread: last words of names that may be there and are not read.
            faults: keeps what would be raised: the names, the first dtype and the first shape.

        Raises:
            DataError: a tensor is missing, left over, of another shape, or of a dtype that it may not have.
        """
        faults = faults or Faults()
        with faults.step():
            self._check_names(expected, families, unread)
        there = {name: shape for name, shape in expected.items() if name in self.tensors}
        with faults.step():
            for name in there:
                _check_dtype(self.tensors[name], dtypes.get(name, ()))
        with faults.step():
            for name, shape in there.items():
                _check_shape(self.tensors[name], tuple(shape))

    def _check_names(
        self, expected: Mapping[str, tuple[int, ...]], families: Iterable[str], unread: Sequence[str]
    ) -> None:
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


def _check_dtype(info: TensorInfo, known: Sequence[torch.dtype]) -> None:
    if known and info.dtype not in known:
        raise DataError(
            f"tensor {info.name!r} in {str(info.path)!r} is {_dtype_name(info.dtype)}, but the quantization_config asks for "
            f"{' or '.join(map(_dtype_name, known))}: they belong to different checkpoints"
        )
    if not known and info.dtype not in _WEIGHT_DTYPES:
        raise DataError(
            f"tensor {info.name!r} in {str(info.path)!r} is {_dtype_name(info.dtype)}, but weights must be {STORED_AS}: "
            f"it looks quantized, and config.json has no quantization_config for it"
        )


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise DataError(
            f"tensor {info.name!r} in {str(info.path)!r} has shape {list(info.shape)}, but config.json asks for "
            f"{list(shape)}: the config.json and the weights probably belong to different models"
        )


def _listing(root: Path) -> list[str]:
    with os_errors(root):
        if not root.exists():
            raise InputMissingError(f"the checkpoint directory {str(root)!r} does not exist")
        if not root.is_dir():
            raise DataError(
                f"{str(root)!r} is not a directory, but a checkpoint is one, of config.json and safetensors"
            )
        return sorted(os.listdir(root))


def _is_layer_weight(name: str) -> bool:
    return name.startswith("model.layers.") and not is_buffer(name)


def _some(names: list[str]) -> str:
    """The count and the first three names, so that thousands of names stay one sentence."""
    listed = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} ({listed}{', …' if len(names) > 3 else ''})"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
