"""The files of a job: refused before any work where they cannot be written, and whole whenever they have their name."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from flexmoe.errors import StorageError, UsageError

PathLike = str | os.PathLike[str]


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
        with _temporary(path):  # that it can be made shows that the directory can be written
            pass


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def publish(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Has `write` fill a temporary file in the same directory, makes it durable and gives it its final name.

    Raises:
        StorageError: the disk is full or the directory read-only.
    """
    with storage_errors(path), _temporary(path) as (file, temporary):
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file beside `path` that is gone afterwards, unless it was renamed."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable, where the file system can (some network ones cannot, and the file is whole anyway)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system raises while `path` is written into a sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space there or choose another output file"
        ) from error
