"""The files of a job: refused before any work where they cannot be written, and whole whenever they have their name."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexmoe.errors import StorageError, UsageError
from policies.common import file_io
from policies.common.file_io import storage_errors

PathLike = str | os.PathLike[str]
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Size and hash of a file as it was written, to check later that it is still the same."""

    size_bytes: int
    sha256: str


def default_error_path(output_path: PathLike) -> Path:
    """`out.errors.jsonl` for `out.jsonl`."""
    path = Path(output_path)
    return path.with_name(path.name.removesuffix(".jsonl") + ".errors.jsonl")


def resolve_outputs(input_path: Path, output_path: PathLike, error_path: PathLike | None) -> tuple[Path, Path]:
    """The final paths (links followed) of the output and the error file, after all that can be refused before any work.

    Raises:
        UsageError: two of the three files are the same, or an output is no regular file.
        StorageError: an output directory is missing or cannot be written.
    """
    output = Path(os.path.realpath(output_path))
    errors = Path(os.path.realpath(error_path or default_error_path(output_path)))
    check_distinct({"input": input_path, "output": output, "error": errors})
    for path in (output, errors):
        check_writable(path)
    return output, errors


def check_distinct(files: Mapping[str, PathLike]) -> None:
    """Show that no two of a run's files are the same one, by name or by link; ``files`` says what each is for.

    Raises:
        UsageError: two are; the sentence names both.
    """
    paths = {name: Path(os.path.realpath(path)) for name, path in files.items()}
    for one, other in itertools.combinations(paths, 2):
        if paths[one] == paths[other] or _same_file(paths[one], paths[other]):
            raise UsageError(f"the {one} file and the {other} file are both {paths[one]}; choose another {other} file")


def check_writable(path: PathLike) -> None:
    """Show that a file can be made at ``path``, before any work is done for it.

    Raises:
        UsageError: ``path`` is there and no regular file.
        StorageError: its directory is missing or cannot be written.
    """
    path = Path(path)
    with storage_errors(path):
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file; choose another output file")
        if not path.parent.is_dir():
            raise StorageError(f"cannot write {path}: there is no directory {path.parent}; create it")
        with file_io.temporary_file(path):  # that it can be made shows that the directory can be written
            pass


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def publish(path: Path, pieces: Iterable[bytes]) -> Published:
    """Writes a temporary file in the same directory, makes it durable and gives it its final name.

    Returns:
        What the file holds now.

    Raises:
        StorageError: the disk is full or the directory read-only; what had the name before is untouched.
    """
    digest, size_bytes = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal size_bytes
        for piece in pieces:
            digest.update(piece)
            size_bytes += len(piece)
            yield piece

    with storage_errors(path):
        file_io.write_file(path, counted())
    return Published(size_bytes=size_bytes, sha256=digest.hexdigest())


def is_as_published(path: Path, published: Published) -> bool:
    """Whether a file still holds what was written to it, to the byte.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.sha256()
    with storage_errors(path):
        if not path.exists() or path.stat().st_size != published.size_bytes:
            return False
        with open(path, "rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
    return digest.hexdigest() == published.sha256


def remove(path: Path) -> None:
    """Removes a file, where there is one.

    Raises:
        StorageError: it cannot be removed.
    """
    with storage_errors(path):
        path.unlink(missing_ok=True)


def remove_temporaries(path: Path) -> None:
    """Removes what a process that was killed while it published the file has left beside it; for the holder of its lock."""
    for left in path.parent.glob(file_io.temporary_pattern(path)):
        with contextlib.suppress(OSError):
            left.unlink()
