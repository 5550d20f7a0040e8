"""Files of clients, by id: their bytes below a directory, what is known of them in the database.

A file is in the database once all its bytes are on the disk, and no sooner. What a process that was killed in between has
left is removed at the next start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sqlite3
from dataclasses import dataclass, fields
from pathlib import Path

from flexmoe.errors import StorageError
from flexmoe.serving.store.database import Database
from policies.common import file_io
from policies.common.file_io import storage_errors

MOST_FILENAME_CHARACTERS = 255


def new_id(kind: str) -> str:
    """A name that nobody has and nobody guesses, ``file-…`` or ``batch_…``."""
    return f"{kind}{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of a file. Its name is the client's and is only ever shown.

    Args:
        seq: its place among all files, in the order in which they came.
        created_s, expires_s: seconds since 1970; None: it does not expire.
    """

    seq: int
    id: str
    filename: str
    purpose: str
    size_bytes: int
    created_s: int
    expires_s: int | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> StoredFile:
        """From a row of the database."""
        return cls(**{each.name: row[each.name] for each in fields(cls)})


class Upload:
    """Bytes that are on their way in; a context manager, after which nothing is left of an upload that was not kept.

    Args:
        path: where they are collected.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes = path, 0
        with storage_errors(path):
            self._descriptor = file_io.create(path)

    def write(self, data: bytes | memoryview) -> None:
        """Adds bytes.

        Raises:
            StorageError: the disk is full, or failed.
        """
        with storage_errors(self.path):
            file_io.write_all(self._descriptor, data)
        self.size_bytes += len(data)

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def sync(self) -> None:
        """What was written is on the disk when this returns.

        Raises:
            StorageError: it is not.
        """
        with storage_errors(self.path):
            file_io.sync(self._descriptor)


class FileStore:
    """The files below a directory.

    Args:
        database: what is known of them.
        directory: of the server's data.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, database: Database, directory: Path) -> None:
        self._database = database
        self._files, self._uploads = directory / "files", directory / "uploads"
        with storage_errors(directory):
            for path in (self._files, self._uploads):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Removes what no file is made of: uploads that were cut off, and bytes whose file was never kept or is gone."""
        known = {row["id"] for row in self._database.read("SELECT id FROM files")}
        left = [*self._uploads.iterdir(), *(path for path in self._files.iterdir() if path.name not in known)]
        for path in left:
            with contextlib.suppress(OSError):
                path.unlink()

    def free_bytes(self) -> int:
        """Free on the disk of the files."""
        return shutil.disk_usage(self._files).free

    @property
    def uploads(self) -> Path:
        """The directory of uploads."""
        return self._uploads

    def keep(self, upload: str, filename: str, purpose: str, now_s: int, expires_s: int | None) -> StoredFile:
        """Makes a file of an upload, durably.

        Args:
            upload: its name in the directory of uploads; it has been synchronized.

        Raises:
            StorageError: the disk is full, or failed; there is no file then.
        """
        return self.adopt(new_id("file-"), self._uploads / Path(upload).name, filename, purpose, now_s, expires_s)

    def adopt(
        self, file_id: str, path: Path, filename: str, purpose: str, now_s: int, expires_s: int | None
    ) -> StoredFile:
        """Makes a file of one that lies on the same disk, which stays where it is.

        Args:
            file_id: its id; where a file has it already, nothing is done.

        Raises:
            StorageError: the disk is full, or failed; there is no file then.
        """
        place = self._files / file_id
        with storage_errors(place):
            with contextlib.suppress(FileExistsError):
                os.link(path, place)
            file_io.sync_directory(self._files)
            size_bytes = place.stat().st_size
        self._database.rows(
            "INSERT OR IGNORE INTO files (id, filename, purpose, size_bytes, created_s, expires_s) VALUES (?, ?, ?, ?, ?, ?)",
            (file_id, filename[:MOST_FILENAME_CHARACTERS], purpose, size_bytes, now_s, expires_s),
        )
        kept = self.get(file_id)
        if kept is None:
            raise StorageError(f"{place} was removed while it was kept; send the file again")
        return kept

    def get(self, file_id: str) -> StoredFile | None:
        """The file of an id; None where there is none."""
        rows = self._database.read("SELECT * FROM files WHERE id = ?", (file_id,))
        return StoredFile.of(rows[0]) if rows else None

    def path(self, file: StoredFile) -> Path:
        """Where its bytes are."""
        return self._files / file.id

    def page(
        self, limit: int, after: StoredFile | None = None, purpose: str | None = None, *, ascending: bool = False
    ) -> tuple[list[StoredFile], bool]:
        """Files in the order in which they came, the newest first unless ``ascending``.

        Returns:
            At most ``limit`` of them behind ``after``, and whether there are more.
        """
        way, order = (">", "ASC") if ascending else ("<", "DESC")
        query = (
            "SELECT * FROM files WHERE (:purpose IS NULL OR purpose = :purpose) "
            f"AND (:after IS NULL OR seq {way} :after) ORDER BY seq {order} LIMIT :most"
        )
        values = {"purpose": purpose, "after": None if after is None else after.seq, "most": limit + 1}
        found = [StoredFile.of(row) for row in self._database.read(query, values)]
        return found[:limit], len(found) > limit

    def delete(self, file: StoredFile) -> None:
        """Forgets a file; who reads it at this moment reads it to the end."""
        self._database.rows("DELETE FROM files WHERE id = ?", (file.id,))
        with contextlib.suppress(OSError):
            self.path(file).unlink()

    def expire(self, now_s: int) -> None:
        """Deletes the files whose time is over."""
        query = "SELECT * FROM files WHERE expires_s IS NOT NULL AND expires_s <= ?"
        for row in self._database.read(query, (now_s,)):
            self.delete(StoredFile.of(row))
