"""Batches, as they are known to clients: what was asked, the state, and when each state began."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flexmoe.serving.store.database import Database
from flexmoe.serving.store.files import new_id

#: States that end by themselves, in which a batch counts as open.
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
#: States that do not change any more.
ENDED = ("failed", "completed", "expired", "cancelled")
_JSON = ("metadata", "errors")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch. Names and times (seconds since 1970) are OpenAI's where it has them.

    Args:
        seq: its place among all batches, in the order in which they came.
        ending: ``cancelled`` or ``expired`` from when it is known that the batch ends so; it survives a kill.
        model: the id of the model that all its rows ask for; None until that is known.
        output_file_id, error_file_id: of the files that it will have; reserved from the beginning.
        files_expire_s: seconds that these are kept; None: until they are deleted.
        errors: why the file cannot run: ``code``, ``message``, ``line``, ``param`` each.
        total, completed, failed: rows, as far as they were known when the state last changed.
        prompt_tokens, generated_tokens: of the rows that completed, likewise.
        cached_tokens: of the prompt tokens, those that were not computed for their row; 0 until the batch has ended.
        priority: batches with a higher one run first.
    """

    seq: int
    id: str
    status: str
    ending: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str] | None
    model: str | None
    output_file_id: str
    error_file_id: str
    files_expire_s: int | None
    errors: Sequence[Mapping[str, Any]] | None
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    priority: int
    cached_tokens: int

    @classmethod
    def of(cls, row: sqlite3.Row) -> BatchRecord:
        """From a row of the database."""
        values = {each.name: row[each.name] for each in fields(cls)}
        return cls(**values | {name: values[name] and json.loads(values[name]) for name in _JSON})

    @property
    def has_ended(self) -> bool:
        """Whether its state changes no more."""
        return self.status in ENDED


class BatchStore:
    """The batches of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        *,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        metadata: Mapping[str, str] | None,
        files_expire_s: int | None,
        priority: int,
        now_s: int,
        expires_at: int,
        most_open: int,
    ) -> BatchRecord | None:
        """A new batch; None where ``most_open`` are open already."""
        batch_id = new_id("batch_")
        values = {
            "id": batch_id,
            "status": "validating",
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "metadata": None if metadata is None else json.dumps(metadata),
            "output_file_id": new_id("file-"),
            "error_file_id": new_id("file-"),
            "files_expire_s": files_expire_s,
            "created_at": now_s,
            "expires_at": expires_at,
            "priority": priority,
        }
        names = ", ".join(values)
        places = ", ".join(f":{name}" for name in values)
        with self._database.transaction():
            if len(self.open()) >= most_open:
                return None
            self._database.rows(f"INSERT INTO batches ({names}) VALUES ({places})", values)
        return self.get(batch_id)

    def get(self, batch_id: str) -> BatchRecord | None:
        """The batch of an id; None where there is none."""
        rows = self._database.read("SELECT * FROM batches WHERE id = ?", (batch_id,))
        return BatchRecord.of(rows[0]) if rows else None

    def of_file(self, file_id: str) -> BatchRecord | None:
        """The batch whose output or error file this is, or will be; None where it is no such file."""
        query = "SELECT * FROM batches WHERE output_file_id = :id OR error_file_id = :id"
        rows = self._database.read(query, {"id": file_id})
        return BatchRecord.of(rows[0]) if rows else None

    def open(self) -> list[BatchRecord]:
        """Those that have not ended, in the order in which they came."""
        places = ", ".join("?" * len(OPEN))
        rows = self._database.rows(f"SELECT * FROM batches WHERE status IN ({places}) ORDER BY seq", OPEN)
        return [BatchRecord.of(row) for row in rows]

    def page(self, limit: int, after: BatchRecord | None = None) -> tuple[list[BatchRecord], bool]:
        """Batches, the newest first: at most ``limit`` of them behind ``after``, and whether there are more."""
        query = "SELECT * FROM batches WHERE (:after IS NULL OR seq < :after) ORDER BY seq DESC LIMIT :most"
        values = {"after": None if after is None else after.seq, "most": limit + 1}
        found = [BatchRecord.of(row) for row in self._database.read(query, values)]
        return found[:limit], len(found) > limit

    def advance(self, batch_id: str, status: str, of: Sequence[str], **values: Any) -> BatchRecord | None:
        """Changes the state of a batch in one step, if it is in one of some others.

        Args:
            of: the states that it may be in.
            **values: further fields.

        Returns:
            The batch as it is now; None where it was in none of these states, and then nothing has changed.
        """
        values = {"status": status, **values}
        values |= {name: json.dumps(values[name]) for name in _JSON if values.get(name) is not None}
        changes = ", ".join(f"{name} = :{name}" for name in values)
        states = ", ".join(f"'{each}'" for each in of)
        query = f"UPDATE batches SET {changes} WHERE id = :id AND status IN ({states}) RETURNING *"
        rows = self._database.rows(query, {**values, "id": batch_id})
        return BatchRecord.of(rows[0]) if rows else None
