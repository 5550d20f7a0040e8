"""Opens one file of a checkpoint directory after checking what it is, and parses the JSON in it strictly.

A download stops half-way, a clone leaves Git-LFS pointers, a hostile archive holds FIFOs: each becomes one sentence.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError, InputMissingError, StorageError
from policies.common import json_files

MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors format for its header; kept for the index and config too
INCOMPLETE = "the download is probably incomplete, fetch it again"
_LFS_MAGIC = b"version https://git-lfs"


def read_json_object(path: Path) -> dict[str, Any]:
    """A whole JSON file of the directory.

    Raises:
        InputMissingError, DataError, StorageError: as `open_file` and `parse_json_object`.
    """
    with open_file(path) as (fd, size_bytes):
        if size_bytes > MAX_JSON_BYTES:
            raise DataError(
                f"{str(path)!r} has {size_bytes} bytes, more than the {MAX_JSON_BYTES} a JSON file may have"
            )
        raw = read_bytes(fd, size_bytes)
    return parse_json_object(raw, repr(str(path)))


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """The object in `raw`, strictly read.

    Args:
        what: names the text in a sentence, for example "the header of 'model.safetensors'".

    Raises:
        DataError: it is not JSON, is read differently by different readers, or is no object.
    """
    try:
        value = json_files.parse(raw)
    except RecursionError:
        raise DataError(f"{what} is nested too deeply to be JSON of a checkpoint: it is damaged or hostile") from None
    except ValueError as error:
        raise DataError(f"{what} is not valid JSON ({error}): the file is damaged or {INCOMPLETE}") from None
    if not isinstance(value, dict):
        raise DataError(f"{what} is not a JSON object but a {type(value).__name__}")
    return value


@contextmanager
def open_file(path: Path) -> Iterator[tuple[int, int]]:
    """The descriptor and size in bytes of a regular, non-empty file that is not a Git-LFS pointer.

    Raises:
        DataError: it is missing (the directory promised it), or is no such file.
        InputMissingError: it may not be read.
        StorageError: the operating system failed to read it, here or in the caller's block.
    """
    with os_errors(path):
        try:
            # O_NONBLOCK, or opening a FIFO would wait for a writer for ever
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DataError(f"the file {str(path)!r} is missing (or a dangling link): {INCOMPLETE}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{str(path)!r} is not a regular file, so it cannot be a part of a checkpoint")
            if status.st_size == 0:
                raise DataError(f"{str(path)!r} is empty: {INCOMPLETE}")
            if read_bytes(fd, min(len(_LFS_MAGIC), status.st_size)) == _LFS_MAGIC:
                raise DataError(
                    f"{str(path)!r} is a Git-LFS pointer, not the file itself: run `git lfs pull` in the directory"
                )
            yield fd, status.st_size
        finally:
            os.close(fd)


def read_bytes(fd: int, nbytes: int, offset: int = 0) -> bytes:
    """Exactly `nbytes` from `offset`, however many reads that takes; an OSError when the file ends before."""
    parts = []
    while nbytes > 0:
        part = os.pread(fd, nbytes, offset)
        if not part:
            raise OSError("the file became shorter while it was read")
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system raises while `path` is read into a sentence."""
    try:
        yield
    except PermissionError:
        raise InputMissingError(f"{str(path)!r} may not be read: its permissions forbid it") from None
    except OSError as error:
        raise StorageError(f"reading {str(path)!r} failed: {error.strerror or error}") from error
