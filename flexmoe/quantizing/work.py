"""The directory of a job that makes a checkpoint: what is whole, its hashes, and the lock, until the checkpoint gets its name.

It lies beside the checkpoint, on the same disk. What it holds is checked before a job resumes, byte by byte.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.quantizing.checksums import Each, check_file
from flexmoe.quantizing.pieces import Stretch, digest
from flexmoe.system.lock import Lock
from policies.common import file_io
from policies.common.file_io import storage_errors

log = logging.getLogger(__name__)
_PART, _JOURNAL, _LOCK = "checkpoint", "journal.jsonl", "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A file that is whole.

    Attributes:
        file: its name.
        stretches: all of its bytes.
        error, norm: as of `Made`, over the file.
    """

    file: str
    stretches: tuple[Stretch, ...]
    error: float
    norm: float


class Work:
    """Holds the directory until `close`.

    Args:
        out: the checkpoint that is made.
        identity: of what is made of what; a job resumes only one of the same identity.

    Raises:
        UsageError: ``out`` is there already, another process works on it, or what was begun has another identity.
        StorageError: the directory cannot be made or read.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.out = Path(os.path.abspath(out))
        if os.path.lexists(self.out) and not (
            self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir())
        ):
            raise UsageError(f"{str(out)!r} already exists: remove it or choose another directory")
        self.directory = self.out.with_name(f".{self.out.name}.quantizing")
        self.part = self.directory / _PART
        with storage_errors(self.directory):
            self.part.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.directory / _LOCK)
        try:
            self.finished = self._resume(identity)
        except BaseException:
            self.close()
            raise

    def add(self, shard: Finished) -> None:
        """A file is whole, under its name, and on the disk."""
        self._append(asdict(shard))

    def check(self, shard: Finished, each: Each) -> None:
        """Read a file that was made before, and hold it against its hashes, as `check_file` does."""
        again = f"remove {str(self.directory)!r} to begin anew, on another disk if it happens again"
        check_file(self.part / shard.file, shard.stretches, each, again)

    def publish(self) -> None:
        """Give the checkpoint its name, and remove the rest."""
        with storage_errors(self.out):
            file_io.sync_directory(self.part)
            file_io.rename(self.part, self.out)
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Release the lock; what is there stays, for a job that resumes."""
        self._lock.release()

    def _resume(self, identity: str) -> dict[str, Finished]:
        """The files that are whole, by name."""
        journal = self.directory / _JOURNAL
        with storage_errors(self.directory):
            records, whole = _records(journal.read_bytes()) if journal.exists() else ([], 0)
            if records and records[0] != {"identity": identity}:
                raise UsageError(
                    f"{str(self.directory)!r} holds a checkpoint that was begun of another model, or in another format: resume "
                    "that, remove the directory, or choose another output"
                )
            for left in self.part.glob(f"*{file_io.temporary_pattern(Path('.safetensors'))}"):
                left.unlink()
            if journal.exists():
                os.truncate(journal, whole)
            if not records:
                self._append({"identity": identity})
        found = [
            Finished(**record | {"stretches": tuple(Stretch(*each) for each in record["stretches"])})
            for record in records[1:]
        ]
        return {each.file: each for each in found}

    def _append(self, record: dict[str, Any]) -> None:
        with storage_errors(self.directory):
            descriptor = file_io.open_to_append(self.directory / _JOURNAL)
            try:
                text = json.dumps(record).encode()
                file_io.write_all(descriptor, b"%s %s\n" % (digest(text).encode(), text))
                file_io.sync(descriptor)
            finally:
                os.close(descriptor)


def _records(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal and their bytes, up to one that was being written when its job was killed, or that has changed."""
    records, whole = [], 0
    for line in data.split(b"\n")[:-1]:
        own, _, text = line.partition(b" ")
        if digest(text).encode() != own:
            log.warning("a line of the journal is damaged; the files that it and those after it name are made again")
            break
        records.append(json.loads(text))
        whole += len(line) + 1
    return records, whole
