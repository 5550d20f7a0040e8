"""The weights of a checkpoint in a hash that does not depend on where their files lie.

Those of a large model take minutes to read, so a sample of their bytes stands for them: any other training or merge changes
nearly every tensor, and the names, shapes and dtypes of all of them are part of the hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from flexmoe.checkpoint.files import open_file, read_bytes
from flexmoe.checkpoint.safetensors import TensorInfo

#: Most tensors of which a piece is read, evenly spread, and the bytes of a piece.
_SAMPLED_TENSORS, _SAMPLE_BYTES = 512, 4096


def weights_hash(tensors: Iterable[TensorInfo]) -> str:
    """The hash of some tensors.

    Raises:
        DataError, StorageError: a file is gone or cannot be read.
    """
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
