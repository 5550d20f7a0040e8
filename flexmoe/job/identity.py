"""What a model and its tokenizer are, in a few hashes that do not depend on where their files lie, and the versions of the
programs that make a result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.files import open_file, read_bytes
from flexmoe.checkpoint.weights_hash import weights_hash
from flexmoe.models.loader import Model

#: What the library that saved the checkpoint notes about itself.
_NOTES = ("_name_or_path", "transformers_version")
_PACKAGES = ("flexmoe", "torch", "transformers", "tokenizers", "safetensors", "numpy", "llguidance")
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
    weights = "dummy" if model.checkpoint is None else weights_hash(model.checkpoint.tensors.values())
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
