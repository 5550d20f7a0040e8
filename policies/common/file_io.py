"""Every byte that a job writes goes through here, and what the operating system refuses becomes a sentence.

A write may take only a part of what it is given, and a read may return less: both are repeated until all is done.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from policies.common.errors import StorageError

_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system raises while `path` is written into a sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space there or choose another output file"
        ) from error


def write_file(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    """Writes a file whole or not at all: what had the name before stays until all of `pieces` is on the disk.

    It is written beside `path` and renamed; a link at `path` is replaced, not followed. File and directory are synced.

    Raises:
        OSError: the directory is missing, read-only or full; nothing is left of the new file.
    """
    path = Path(path)
    with temporary_file(path) as (descriptor, temporary):
        for chunk in _gathered(pieces):
            write_all(descriptor, chunk)
        sync(descriptor)
        rename(temporary, path)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[int, Path]]:
    """A new file beside `path`, open for writing, that is gone afterwards, unless it was renamed."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        descriptor = create(temporary)
        try:
            yield descriptor, temporary
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_pattern(path: Path) -> str:
    """A pattern of the names that `temporary_file` gives, for what a process that was killed has left."""
    return f"{glob.escape(path.name)}.tmp-*-{'[0-9a-f]' * 8}"


def open_to_append(path: Path) -> int:
    """A descriptor that reads anywhere and writes at the end; the file is made where there is none."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def create(path: Path) -> int:
    """A descriptor of a file that was not there before."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of `data`."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Writes all of `data` from `offset` on; several threads may, at the same time."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes from `offset`, fewer only where the file ends."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, min(size, _CHUNK_BYTES), offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def sync(descriptor: int) -> None:
    """What was written is on the disk when this returns."""
    os.fsync(descriptor)


def rename(old: Path, new: Path) -> None:
    """Gives a file its final name, in one step and durably; what had the name before is gone."""
    os.replace(old, new)
    sync_directory(new.parent)


def sync_directory(directory: Path) -> None:
    """Makes new names durable, where the file system can (some network ones cannot, and the files are whole anyway)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about `_CHUNK_BYTES`: lines are short, and a system call for each would cost more."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _CHUNK_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)
