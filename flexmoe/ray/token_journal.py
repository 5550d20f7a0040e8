"""What rows in flight have generated, on a disk that all nodes share: an actor that takes the place of another resumes its tokens.

A journal is a directory with one file for each actor. The file is written anew, whole or not at all, every so many
seconds, and has only the rows that are in flight or not yet handed back, so that it stays as small as they are. Rows that
Ray has are Ray's to keep.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexmoe.errors import DataError, UsageError
from flexmoe.job.journal_records import HEAD_BYTES, TOKENS, Generated, decode, encode
from flexmoe.params import InFlight, Resumed
from policies.common.checks import check_number
from policies.common.file_io import storage_errors, write_file

log = logging.getLogger(__name__)
#: Bytes of the key of a row.
KEY_BYTES = 16
_SUFFIX = ".tokens"


class TokenJournal:
    """The journal in `directory`, which is made where there is none.

    Args:
        directory: on a disk that all nodes share.
        interval_s: seconds between two writes.

    Attributes:
        interval_s: as given.
        recovered_rows: rows of which other actors have left tokens.

    Raises:
        UsageError: the interval is no number of seconds, or the directory is a file.
        StorageError: the directory cannot be made or read.
    """

    def __init__(self, directory: str | os.PathLike[str], interval_s: float) -> None:
        self._directory = Path(directory)
        self.interval_s = check_number("checkpoint_interval_s", interval_s, zero=True)
        if self._directory.exists() and not self._directory.is_dir():
            raise UsageError(f"journal is {str(directory)!r}, which is a file; give a directory")
        with storage_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._known = _read_all(self._directory)
        self.recovered_rows = len(self._known)
        self._path = self._directory / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"

    def resumed(self, key: bytes) -> tuple[Resumed, ...]:
        """What the row of this key has generated before, for its one sample; (): nothing."""
        before = self._known.get(key)
        return () if before is None else (before.resumed(),)

    def save(self, rows: Iterable[tuple[bytes, InFlight]]) -> None:
        """Writes what rows have generated, by their keys, in place of what this actor wrote before.

        Raises:
            StorageError: the disk is full, or failed; the file is as it was.
        """
        with storage_errors(self._path):
            write_file(self._path, (_record(key, state) for key, state in rows))

    def close(self) -> None:
        """Removes this actor's file: all of its rows have been handed back."""
        self._path.unlink(missing_ok=True)


def _record(key: bytes, state: InFlight) -> bytes:
    generated = Generated(prompt=0, sample=state.index, token_ids=array("I", state.token_ids), logprobs=state.logprobs)
    return encode(TOKENS, 0, key + generated.encode())


def _read_all(directory: Path) -> dict[bytes, Generated]:
    """Of each row the most tokens that any file has."""
    known: dict[bytes, Generated] = {}
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            for key, generated in _records(path.read_bytes()):
                if key not in known or len(generated.token_ids) > len(known[key].token_ids):
                    known[key] = generated
        except FileNotFoundError:  # its actor has come to its end meanwhile
            continue
        except DataError as error:
            log.warning("%s is damaged (%s); the rows that it lacks are computed from their beginning", path, error)
    return known


def _records(data: bytes) -> Iterator[tuple[bytes, Generated]]:
    at = 0
    while at < len(data):
        payload = decode(data, at)
        if payload is None:
            raise DataError(f"no record at byte {at}")
        yield payload[:KEY_BYTES], Generated.decode(payload[KEY_BYTES:])
        at += HEAD_BYTES + len(payload)
