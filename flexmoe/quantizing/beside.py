"""What lies beside the weights of a checkpoint: config, index, tokenizer, chat template, licence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.checkpoint.files import os_errors
from flexmoe.quantizing.outputs import Shard
from policies.common.file_io import storage_errors, write_file

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_INDEX = "model.safetensors.index.json"


def copy_beside(checkpoint: Checkpoint, config: Mapping[str, Any], shards: Sequence[Shard], directory: Path) -> None:
    """Write the config and the index, and copy the rest; a file of the same name is replaced.

    Raises:
        InputMissingError, StorageError: a file cannot be read, or not written.
    """
    written = {"config.json": json.dumps(config, indent=2).encode() + b"\n"}
    if len(shards) > 1:
        written[_INDEX] = _index(shards)
    with os_errors(checkpoint.directory):
        for path in sorted(checkpoint.directory.iterdir()):
            if path.is_file() and _belongs(path.name) and path.name not in written:
                written[path.name] = path.read_bytes()
    for name, data in written.items():
        with storage_errors(directory / name):
            write_file(directory / name, [data])


def _belongs(name: str) -> bool:
    """Whether a file says something of the packed model too; an index of the weights that were read does not."""
    if name.endswith(".index.json"):
        return False
    return name.endswith(_SUFFIXES) or name.startswith(_TERMS)


def _index(shards: Sequence[Shard]) -> bytes:
    sizes = {"total_size": sum(shard.data_bytes for shard in shards)}
    names = {each.name: shard.file for shard in shards for each in shard.outputs}
    return json.dumps({"metadata": sizes, "weight_map": dict(sorted(names.items()))}, indent=2).encode() + b"\n"
