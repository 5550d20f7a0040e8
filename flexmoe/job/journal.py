"""The journal of a job: every finished row, and now and then the tokens of the rows in flight. It is only ever appended to.

A finished row is given to the operating system at once, so that the end of the process costs nothing; `checkpoint`
makes all of it durable, so that the end of the machine costs what came since. What was cut off at the end by either is
left out when the journal is opened again. Damage before a place that had been made durable is no such end: it is an
error, because rows would be lost that were reported as safe.
"""

from __future__ import annotations

import logging
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flexmoe.errors import DataError
from flexmoe.job.journal_records import (
    DONE,
    FAILED,
    HEAD_BYTES,
    MARK,
    OPENING,
    SYNCED,
    TOKENS,
    Generated,
    Head,
    Kind,
    decode,
    decode_counts,
    decode_line,
    encode,
    encode_line,
)
from flexmoe.params import InFlight
from policies.common import file_io
from policies.common.file_io import storage_errors

log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20


class Journal:
    """The journal at `path`, made where there is none.

    Args:
        path: the file.
        rows: rows of the job; they are numbered from 0.
        job: the job's fingerprint; a journal of another one is refused.
        after_work: called when work has been kept: a row that did not fail, or tokens of one in flight.

    Attributes:
        rows_done, rows_failed: finished rows (failed ones among them), and the failed ones.
        prompt_tokens, generated_tokens: of the finished rows that did not fail.
        recovered_rows: rows that were finished when the journal was opened.
        recovered_tokens: tokens of unfinished rows that were kept.

    Raises:
        DataError: it is another job's, or damaged where it had been durable.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, rows: int, job: str, after_work: Callable[[], None] = lambda: None) -> None:
        self.path, self._after_work = path, after_work
        self._places, self._lengths = array("q", [-1]) * rows, array("I", [0]) * rows
        self._generated = array("I", [0]) * rows
        self._failed = bytearray(rows)
        self._partial: dict[int, dict[tuple[int, int], Generated]] = {}
        self._written: dict[int, dict[tuple[int, int], int]] = {}
        self._end, self._intact = 0, True
        self.rows_done = self.rows_failed = self.prompt_tokens = self.generated_tokens = 0
        with storage_errors(path):
            self._descriptor = file_io.open_to_append(path)
        try:
            with storage_errors(path):
                self._recover(job)
        except BaseException:
            self.close()
            raise
        self.recovered_rows = self.rows_done
        self.recovered_tokens = sum(sum(counts.values()) for counts in self._written.values())

    def __contains__(self, row: int) -> bool:
        """Whether a row is finished."""
        return self._places[row] >= 0

    def generated(self) -> Iterator[tuple[int, int]]:
        """The rows that finished and did not fail, in order, each with the tokens that it generated."""
        return (
            (row, self._generated[row])
            for row, place in enumerate(self._places)
            if place >= 0 and not self._failed[row]
        )

    @property
    def is_untouched(self) -> bool:
        """Whether no work is in it: rows that were refused were none."""
        return self.rows_done == self.rows_failed and not self._written

    @property
    def partial_rows(self) -> list[int]:
        """Rows that were in flight when the journal was last left, in order."""
        return sorted(self._partial)

    def take_partial(self, row: int) -> dict[tuple[int, int], Generated]:
        """What was generated of an unfinished row before, by (prompt, sample); it is not kept any longer."""
        return self._partial.pop(row, {})

    def finish(
        self, row: int, line: bytes, *, failed: bool = False, prompt_tokens: int = 0, generated_tokens: int = 0
    ) -> None:
        """Keeps the line of a row; a row has one.

        Raises:
            StorageError: the disk is full, or failed; the journal holds all that it held before.
        """
        if row in self:
            raise ValueError(f"row {row} is already finished")
        payload = encode_line(line, prompt_tokens, generated_tokens)
        place = self._end
        self._append(FAILED if failed else DONE, row, payload)
        self._note_finished(row, place, len(payload), failed, prompt_tokens, generated_tokens)

    def checkpoint(self, in_flight: Iterable[tuple[int, int, InFlight]] = ()) -> None:
        """Adds what the rows in flight have generated since the last time, and makes all of the journal durable.

        Args:
            in_flight: (row, prompt, sample's state) of every sample in flight.

        Raises:
            StorageError: the disk is full, or failed.
        """
        for row, prompt, state in in_flight:
            counts, key = self._written.setdefault(row, {}), (prompt, state.index)
            start = counts.get(key, 0)
            ids = array("I", state.token_ids[start:])
            if not ids:
                continue
            logprobs = None if state.logprobs is None else state.logprobs[start:]
            new = Generated(prompt=prompt, sample=state.index, start=start, token_ids=ids, logprobs=logprobs)
            self._append(TOKENS, row, new.encode())
            counts[key] = start + len(ids)
        with storage_errors(self.path):
            file_io.sync(self._descriptor)
        self._append(SYNCED, self._end, b"")

    def lines(self, *, failed: bool) -> Iterator[bytes]:
        """The lines of the failed (or of the other) rows, in the order of the rows.

        Raises:
            DataError: a line is not what was written.
        """
        for row, place in enumerate(self._places):
            if place >= 0 and self._failed[row] == failed:
                yield decode_line(self._payload(place, self._lengths[row]))

    def snapshot(self, *, failed: bool) -> tuple[int, Iterator[bytes]]:
        """What `lines` has now, for another thread: neither later lines nor the end of the journal touch it.

        Returns:
            The bytes of all these lines, and the lines.

        Raises:
            StorageError: the journal is closed.
            DataError: while it is read: a line is not what was written.
        """
        chosen = [row for row, place in enumerate(self._places) if place >= 0 and self._failed[row] == failed]
        places = [(self._places[row], self._lengths[row]) for row in chosen]
        with storage_errors(self.path):
            file = os.fdopen(os.dup(self._descriptor), "rb")

        def lines() -> Iterator[bytes]:
            with file:
                for place, length in places:
                    yield decode_line(self._payload(place, length, file.fileno()))

        return sum(length - len(encode_line(b"", 0, 0)) for _, length in places), lines()

    def failed_rows(self) -> list[int]:
        """The rows that failed, in order."""
        return [row for row, failed in enumerate(self._failed) if failed]

    def rename(self, path: Path) -> None:
        """Gives the file another name, durably.

        Raises:
            StorageError: the disk failed.
        """
        with storage_errors(path):
            file_io.rename(self.path, path)
        self.path = path

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, kind: Kind, row: int, payload: bytes) -> None:
        if not self._intact:
            raise RuntimeError(f"{self.path} took a part of a record and cannot be appended to")
        record = encode(kind, row, payload)
        with storage_errors(self.path):
            try:
                file_io.write_all(self._descriptor, record)
            except OSError:
                self._cut()
                raise
        self._end += len(record)
        if kind in (DONE, TOKENS):
            self._after_work()

    def _cut(self) -> None:
        """Cuts off a part of a record; where even that fails, the next start does it."""
        try:
            os.ftruncate(self._descriptor, self._end)
        except OSError:
            self._intact = False

    def _note_finished(
        self, row: int, place: int, length: int, failed: bool, prompt_tokens: int, generated_tokens: int
    ) -> None:
        self._places[row], self._lengths[row], self._failed[row] = place, length, failed
        self._generated[row] = generated_tokens
        self.rows_done += 1
        self.rows_failed += failed
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens
        self._partial.pop(row, None)
        self._written.pop(row, None)

    def _payload(self, place: int, length: int, descriptor: int | None = None) -> bytes:
        with storage_errors(self.path):
            data = file_io.read_at(self._descriptor if descriptor is None else descriptor, HEAD_BYTES + length, place)
        payload = decode(data)
        if payload is None or len(payload) != length:
            raise DataError(f"{self.path} is damaged at byte {place}: the disk returned other bytes than were written")
        return payload

    def _recover(self, job: str) -> None:
        """Reads all records that are there, and cuts off what follows the last whole one."""
        size = os.fstat(self._descriptor).st_size
        while self._end < size and (record := self._read_record(self._end, size)):
            head, payload = record
            try:
                self._take(head, payload, job)
            except DataError as error:
                raise DataError(f"{self.path}: the record at byte {self._end} cannot be used: {error}") from None
            self._end += HEAD_BYTES + head.length
        if self._end < size:
            self._refuse_damage(size)
            log.warning("%s: its last %d bytes were cut off and are left out", self.path, size - self._end)
            os.ftruncate(self._descriptor, self._end)
        if self._end == 0:
            self._append(OPENING, 0, job.encode())

    def _read_record(self, place: int, size: int) -> tuple[Head, bytes] | None:
        """The record at `place`, None when it is not whole. Of a line only the beginning is kept."""
        head = Head.decode(file_io.read_at(self._descriptor, HEAD_BYTES, place))
        if head is None or place + HEAD_BYTES + head.length > size:
            return None
        whole = head.kind not in (DONE, FAILED)
        crc, kept, at, end = 0, b"", place + HEAD_BYTES, place + HEAD_BYTES + head.length
        while at < end:
            piece = file_io.read_at(self._descriptor, min(_CHUNK_BYTES, end - at), at)
            if not piece:
                return None
            crc = zlib.crc32(piece, crc)
            kept = kept + piece if whole or not kept else kept
            at += len(piece)
        return (head, kept) if crc == head.crc else None

    def _take(self, head: Head, payload: bytes, job: str) -> None:
        if head.kind == OPENING or self._end == 0:
            if head.kind != OPENING or payload.decode(errors="replace") != job:
                raise DataError("it is not the journal of this job")
        elif head.kind in (DONE, FAILED):
            self._take_finished(head, payload)
        elif head.kind == TOKENS:
            self._take_tokens(self._row(head), Generated.decode(payload))
        elif head.kind != SYNCED:
            raise DataError(f"it is of a kind ({head.kind}) that this program does not know")

    def _take_finished(self, head: Head, payload: bytes) -> None:
        row = self._row(head)
        if row in self:
            raise DataError(f"row {row} is finished twice, so two runs wrote to it at once")
        self._note_finished(row, self._end, head.length, head.kind == FAILED, *decode_counts(payload))

    def _take_tokens(self, row: int, new: Generated) -> None:
        samples = self._partial.setdefault(row, {})
        have = samples.setdefault((new.prompt, new.sample), Generated(prompt=new.prompt, sample=new.sample))
        have.extend(new)
        self._written.setdefault(row, {})[new.prompt, new.sample] = len(have.token_ids)

    def _row(self, head: Head) -> int:
        if head.row >= len(self._places):
            raise DataError(f"there is no row {head.row} in a job of {len(self._places)}")
        return head.row

    def _refuse_damage(self, size: int) -> None:
        """Shows that nothing beyond the last whole record had been made durable."""
        tail, at = b"", self._end
        while piece := file_io.read_at(self._descriptor, min(_CHUNK_BYTES, size - at), at):
            data, begin = tail + piece, at - len(tail)
            found = data.find(MARK)
            while found >= 0:
                head = Head.decode(data[found : found + HEAD_BYTES])
                if head is not None and head.kind == SYNCED and head.row == begin + found:
                    raise DataError(
                        f"{self.path} is damaged at byte {self._end}, and {begin + found - self._end} bytes beyond it "
                        f"were on the disk already. To keep the rows before it and do the others again: "
                        f"truncate -s {self._end} {self.path}"
                    )
                found = data.find(MARK, found + 1)
            tail = data[-(HEAD_BYTES - 1) :]
            at += len(piece)
