"""The database of a server: SQLite in WAL mode, at a version of its schema that is raised step by step."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError, StorageError

#: Each step raises the version by one. Steps that have shipped are never changed; new ones are added at the end.
MIGRATIONS = (
    """
    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        created_s INTEGER NOT NULL,
        expires_s INTEGER
    ) STRICT;
    CREATE TABLE batches (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        status TEXT NOT NULL,
        ending TEXT,
        endpoint TEXT NOT NULL,
        input_file_id TEXT NOT NULL,
        completion_window TEXT NOT NULL,
        metadata TEXT,
        model TEXT,
        output_file_id TEXT NOT NULL UNIQUE,
        error_file_id TEXT NOT NULL UNIQUE,
        files_expire_s INTEGER,
        errors TEXT,
        total INTEGER NOT NULL DEFAULT 0,
        completed INTEGER NOT NULL DEFAULT 0,
        failed INTEGER NOT NULL DEFAULT 0,
        prompt_tokens INTEGER NOT NULL DEFAULT 0,
        generated_tokens INTEGER NOT NULL DEFAULT 0,
        created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        in_progress_at INTEGER,
        finalizing_at INTEGER,
        completed_at INTEGER,
        failed_at INTEGER,
        expired_at INTEGER,
        cancelling_at INTEGER,
        cancelled_at INTEGER
    ) STRICT;
    CREATE INDEX batches_by_status ON batches (status, seq);
    """,
    "ALTER TABLE batches ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;",
    "ALTER TABLE batches ADD COLUMN cached_tokens INTEGER NOT NULL DEFAULT 0;",
)


class Database:
    """The database at a path, made where there is none. Any thread may use it; one does at a time.

    Args:
        path: the file.
        migrations: the steps of the schema.

    Raises:
        DataError: it is no database, is damaged, or was written by a newer program.
        StorageError: it cannot be opened or written.
    """

    def __init__(self, path: Path, migrations: Sequence[str] = MIGRATIONS) -> None:
        self.path, self._lock, self._read_lock = path, threading.RLock(), threading.Lock()
        with self._errors():
            self._connection = _connected(path)
        try:
            with self._errors():
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                self._migrate(migrations)
                self._reading = _connected(path)
        except BaseException:
            self._connection.close()
            raise

    @property
    def version(self) -> int:
        """Of the schema."""
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def read(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """The rows of a query, as of the last transaction that has ended. It waits for nobody who writes, nor for the disk.

        Raises:
            StorageError: the disk failed.
        """
        with self._read_lock, self._errors():
            return self._reading.execute(query, values).fetchall()

    def rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        """Executes one statement; returns the rows that it gives.

        Raises:
            StorageError: the disk is full, or failed.
        """
        with self._lock, self._errors():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is executed inside is done as a whole, or not at all where an exception leaves it; no other thread comes in
        between."""
        with self._lock:
            with self._errors():
                self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                with self._errors():
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Closes it; a second call does nothing."""
        with self._lock, self._read_lock:
            self._reading.close()
            self._connection.close()

    def _migrate(self, migrations: Sequence[str]) -> None:
        if self.version > len(migrations):
            raise DataError(
                f"{self.path} has version {self.version} of its schema, and this program knows {len(migrations)}: it was "
                "written by a newer FlexMoE, so update this one or take another data directory"
            )
        for step in range(self.version, len(migrations)):
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {migrations[step]}; PRAGMA user_version = {step + 1}; COMMIT;"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(f"the database {self.path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise DataError(f"the database {self.path} is damaged or none ({error}); restore or remove it") from error


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection
