"""The hashes of a packed checkpoint's files, stretch by stretch, which name the tensor that a disk or a copy has changed.

A line of the file is a JSON object: the name of a file of weights, and its stretches as lists of `Stretch`'s fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flexmoe.checkpoint.files import open_file, os_errors, read_bytes
from flexmoe.errors import DataError, InputMissingError
from flexmoe.quantizing.pieces import Stretch, digest
from flexmoe.system.machine import usable_cores
from policies.common.file_io import storage_errors, write_file

#: Beside the weights.
FILE = "checksums.jsonl"

Each = Callable[[Callable[[Stretch], None], Iterable[Stretch]], object]


def write_checksums(directory: Path, stretches: Mapping[str, Sequence[Stretch]]) -> None:
    """Write the hashes of all files of weights into their directory."""
    lines = [json.dumps({"file": file, "stretches": own}).encode() + b"\n" for file, own in stretches.items()]
    with storage_errors(directory / FILE):
        write_file(directory / FILE, lines)


def check_file(path: Path, stretches: Iterable[Stretch], each: Each, advice: str) -> None:
    """Read a file, and hold it against its hashes.

    Args:
        each: calls a function with every one of some stretches, and raises what it raises.
        advice: what to do where it differs.

    Raises:
        InputMissingError: there is no such file.
        DataError: a byte is another one; names the tensor and the file.
    """
    with open_file(path) as (file, _):

        def check(stretch: Stretch) -> None:
            try:
                data = read_bytes(file, stretch.length, stretch.offset)
            except OSError:
                data = b""
            if digest(data) != stretch.digest:
                raise DataError(
                    f"tensor {stretch.tensor!r} in {str(path)!r} is not what was written there (bytes {stretch.offset} to "
                    f"{stretch.offset + stretch.length}): the disk or something else has changed it; {advice}"
                )

        each(check, stretches)


def check_checkpoint(directory: Path) -> None:
    """Hold all files of weights against the hashes beside them, on all cores.

    Raises:
        InputMissingError: there are no hashes, or a file is missing.
        DataError: the hashes cannot be read, or a byte of a file is another one.
    """
    with ThreadPoolExecutor(usable_cores(), "checksums") as pool:
        for file, stretches in _read(directory / FILE):
            check_file(
                directory / file,
                stretches,
                lambda check, own: list(pool.map(check, own)),
                "make the checkpoint anew, or copy it again",
            )


def _read(path: Path) -> Iterable[tuple[str, list[Stretch]]]:
    if not path.exists():
        raise InputMissingError(
            f"there is no {str(path)!r}: only what flexmoe.quantize has made has hashes of its weights"
        )
    with open_file(path) as (file, size), os_errors(path):
        text = read_bytes(file, size)
    try:
        records = [json.loads(line) for line in text.splitlines()]
        found = [(str(each["file"]), [Stretch(*own) for own in each["stretches"]]) for each in records]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{str(path)!r} does not hold hashes of weights: {error}") from error
    for name, stretches in found:
        whole = all(isinstance(n, int) and n >= 0 for each in stretches for n in (each.offset, each.length))
        if not whole or Path(name).name != name:
            raise DataError(f"{str(path)!r} does not hold hashes of weights: {name!r} is no file with stretches")
    return found
