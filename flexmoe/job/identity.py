"""What a model and its tokenizer are, in a few hashes that do not depend on where their files lie, and the versions of the
programs that make a result.

The weights of a large model take minutes to read, so a sample of their bytes stands for them: any other training or
merge changes nearly every tensor, and the names, shapes and dtypes of all of them are part of the hash.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.files import open_file, read_bytes
from flexmoe.checkpoint.safetensors import TensorInfo
from flexmoe.models.loader import Model

#: Most tensors of which a piece is read, evenly spread, and the bytes of a piece.
_SAMPLED_TENSORS, _SAMPLE_BYTES = 512, 4096
#: What the library that saved the checkpoint notes about itself.
_NOTES = ("_name_or_path", "transformers_version")
_PACKAGES = ("flexmoe", "torch", "transformers", "tokenizers", "safetensors", "numpy")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)


def model_identity(model: Model) -> dict[str, str]:
    """Hashes of the model's shape and of its weights.

    Raises:
        DataError, StorageError: a file of weights is gone or cannot be read.
    """
    shape = {name: value for name, value in model.config.items() if name not in _NOTES}
    shape |= {"shape": model.arch.fingerprint()}
    weights = "dummy" if model.checkpoint is None else _weights(model.checkpoint.tensors.values())
    return {"model": digest(shape), "weights": weights}


def tokenizer_identity(directory: Path | None) -> str:
    """A hash of the tokenizer's files.

    Raises:
        DataError, StorageError: a file cannot be read.
    """
    found = {}
    paths = [] if directory is None else [Path(directory) / name for name in TOKENIZER_FILES]
    for path in paths:
        if path.is_file() and path.stat().st_size:
            with open_file(path) as (descriptor, size):
                found[path.name] = hashlib.sha256(read_bytes(descriptor, size)).hexdigest()
    return digest(found)


def versions() -> dict[str, str | None]:
    """Of Python and the libraries that decide the numbers; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def digest(value: Mapping[str, Any]) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _weights(tensors: Iterable[TensorInfo]) -> str:
    ordered = sorted(tensors, key=lambda info: info.name)
    total = hashlib.sha256()
    for info in ordered:
        total.update(json.dumps([info.name, str(info.dtype), list(info.shape)]).encode())
    sampled = ordered[:: -(-len(ordered) // _SAMPLED_TENSORS)]
    for path in dict.fromkeys(info.path for info in sampled):
        with open_file(path) as (descriptor, _):
            for info in sampled:
                if info.path == path:
                    total.update(_piece(descriptor, info))
    return total.hexdigest()


def _piece(descriptor: int, info: TensorInfo) -> bytes:
    size = min(info.nbytes, _SAMPLE_BYTES)
    return read_bytes(descriptor, size, info.offset + (info.nbytes - size) // 2)
