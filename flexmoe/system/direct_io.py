"""Disk reads and writes that bypass the page cache, by several threads, into reusable aligned buffers.

Reads ask for the page-aligned superset of an extent, because O_DIRECT wants offset, length and address aligned. Where
O_DIRECT is refused (EINVAL: tmpfs, some overlays) the same call reads through the page cache and drops the pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from flexmoe.errors import DataError, StorageError
from flexmoe.system.trace import Recorder
from policies.common.memory_units import align_down, align_up

PIECE_BYTES = 4 << 20
#: Pieces of weights where small transfers share the disk with them. A drive serves what it has been asked for in turn, so a small
#: transfer waits for all pieces that are under way.
SHARED_PIECE_BYTES = 1 << 20
READ_THREADS = 4


class DirectFile:
    """A file read and written at given offsets, O_DIRECT where the file system takes it.

    Args:
        path: the file.
        writable: create it and open for reading and writing.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, writable: bool = False):
        self.path = str(path)
        flags = os.O_CLOEXEC | ((os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY)
        try:
            self.direct = True
            try:
                self._fd = os.open(self.path, flags | os.O_DIRECT, 0o600)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                self.direct = False
                self._fd = os.open(self.path, flags, 0o600)
        except OSError as e:
            raise StorageError(f"cannot open {self.path}: {e.strerror}") from e

    def _fall_back(self) -> None:
        """Go on through the page cache with the same descriptor (the file may have no name any more)."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self.direct = False

    def read_into(self, buffer: memoryview, offset: int, needed: int | None = None) -> None:
        """Fill ``buffer`` from ``offset``; only the first ``needed`` bytes (default all) must exist.

        Raises:
            StorageError: the device reports an error.
            DataError: the file ends before ``needed`` bytes.
        """
        needed = len(buffer) if needed is None else needed
        done = 0
        while done < needed:
            direct = self.direct  # another thread may fall back meanwhile
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as e:
                if e.errno == errno.EINVAL and direct:
                    self._fall_back()
                    continue
                raise StorageError(f"reading {self.path} at byte {offset + done} failed: {e.strerror}") from e
            done += count
            if count == 0 or (done < needed and offset + done >= os.fstat(self._fd).st_size):
                raise DataError(
                    f"{self.path} ends at byte {offset + done}, {needed - done} bytes early: it changed or is truncated"
                )
            if done < needed and self.direct:
                done = align_down(done)
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def write_from(self, buffer: memoryview, offset: int) -> None:
        """Write all of ``buffer`` at ``offset``.

        Raises:
            StorageError: the disk is full or reports an error.
        """
        done = 0
        while done < len(buffer):
            direct = self.direct
            try:
                done += os.pwritev(self._fd, [buffer[done:]], offset + done)
            except OSError as e:
                if e.errno == errno.EINVAL and direct:
                    self._fall_back()
                    continue
                raise StorageError(f"writing {self.path} at byte {offset + done} failed: {e.strerror}") from e

    def sync(self) -> None:
        """Flush written data to the device.

        Raises:
            StorageError: the disk is full or reports an error.
        """
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise StorageError(f"flushing {self.path} failed: {e.strerror}") from e

    def close(self) -> None:
        """Close the descriptor; the file cannot be used afterwards."""
        fd, self._fd = self._fd, -1  # a second close must not close a file that has the number by then
        if fd >= 0:
            os.close(fd)


OnDone = Callable[[BaseException | None], None]


class Pending:
    """Completion of a group of pieces; the last piece calls ``on_done`` with the first error, which `wait` raises."""

    def __init__(self, pieces: int, on_done: OnDone | None = None):
        self._left = pieces
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._on_done = on_done
        self.error: BaseException | None = None
        if pieces == 0:
            self._finish()

    def piece_done(self, error: BaseException | None = None) -> None:
        """One piece is complete, or failed with ``error``."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            last = self._left == 0
        if last:
            self._finish()

    def _finish(self) -> None:
        if self._on_done is not None:
            self._on_done(self.error)
        self._done.set()

    def wait(self) -> None:
        """Block until every piece is complete; raise the first error."""
        self._done.wait()
        if self.error is not None:
            raise self.error


class Readable(Protocol):
    """What may be read from: a `DirectFile`, or what is like one."""

    def read_into(self, buffer: memoryview, offset: int, needed: int | None = None) -> None:
        """As `DirectFile.read_into`."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One contiguous transfer between ``file`` at ``offset`` and host bytes; ``needed`` bytes must exist. Only a `DirectFile` is
    written to."""

    file: Readable
    offset: int
    buffer: memoryview
    needed: int


class _Piece(NamedTuple):
    """A part of a transfer that waits for a thread, the name that it is recorded under, and whom it completes."""

    transfer: Transfer
    name: str
    pending: Pending


class TransferQueue(Protocol):
    """What takes transfers: a `DiskPool`, or its urgent side."""

    def submit(self, transfers: list[Transfer], name: str, on_done: OnDone | None = None) -> Pending:
        """Queue the transfers; returns their joint completion."""


class DiskPool:
    """Threads that serve disk transfers in the order they are submitted, urgent ones before all others.

    The threads are started with the first transfers and run until `close`.

    Args:
        recorder: where bytes and times go.
        lane: ``disk_read`` or ``disk_write``.
        threads: transfers in flight at once.
        worker: worker i records as ``lane/<worker>i``.
        piece_bytes: transfers are cut into pieces of about so many.
    """

    def __init__(
        self,
        recorder: Recorder,
        lane: str = "disk_read",
        threads: int = READ_THREADS,
        worker: str = "",
        piece_bytes: int = PIECE_BYTES,
    ):
        self._recorder, self._piece_bytes = recorder, piece_bytes
        self._write = lane == "disk_write"
        self._calls: queue.SimpleQueue[bool | None] = queue.SimpleQueue()  # one for each piece that waits, None to end
        self._waiting: dict[bool, deque[_Piece]] = {True: deque(), False: deque()}  # by urgency
        self._names = [f"{lane}/{worker}{i}" for i in range(threads)]
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()

    def submit(
        self, transfers: list[Transfer], name: str, on_done: OnDone | None = None, *, urgent: bool = False
    ) -> Pending:
        """Queue the transfers, cut into pieces; returns their joint completion.

        Args:
            urgent: overtake what is not; a piece that has been begun is finished first.
        """
        self._start()
        pieces = [piece for t in transfers for piece in _cut(t, self._piece_bytes)]
        pending = Pending(len(pieces), on_done)
        for piece in pieces:
            self._waiting[urgent].append(_Piece(piece, name, pending))
            self._calls.put(True)
        return pending

    def urgent(self) -> UrgentTransfers:
        """The same threads, for transfers that are all urgent."""
        return UrgentTransfers(self)

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        with self._starting:
            for name in self._names[len(self._threads) :]:
                thread = threading.Thread(target=self._work, args=(name,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _work(self, lane: str) -> None:
        while self._calls.get() is not None:
            piece, name, pending = self._next()
            start = time.perf_counter()
            error: BaseException | None = None
            try:
                if self._write and isinstance(piece.file, DirectFile):
                    piece.file.write_from(piece.buffer, piece.offset)
                else:
                    piece.file.read_into(piece.buffer, piece.offset, piece.needed)
            except Exception as e:
                error = e
            self._recorder.add(lane, name, start, time.perf_counter(), len(piece.buffer))
            pending.piece_done(error)

    def _next(self) -> _Piece:
        while True:  # there is one for every call, and another worker may have had the one that came with this call
            for urgent in (True, False):
                with contextlib.suppress(IndexError):
                    return self._waiting[urgent].popleft()


@dataclass(frozen=True, slots=True)
class UrgentTransfers:
    """The urgent side of a pool: what is submitted here overtakes the rest."""

    pool: DiskPool

    def submit(self, transfers: list[Transfer], name: str, on_done: OnDone | None = None) -> Pending:
        """As `DiskPool.submit`."""
        return self.pool.submit(transfers, name, on_done, urgent=True)


def _cut(transfer: Transfer, piece_bytes: int) -> list[Transfer]:
    """Pieces of about so many bytes, all alike: several threads then share even one unit's."""
    size = len(transfer.buffer)
    each = align_up(-(-size // max(1, round(size / piece_bytes))))
    return [
        Transfer(
            transfer.file,
            transfer.offset + start,
            transfer.buffer[start : min(size, start + each)],
            min(each, transfer.needed - start),
        )
        for start in range(0, size, each)
    ]
