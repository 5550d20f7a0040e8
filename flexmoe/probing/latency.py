"""Seconds of a small transfer to or from disk that somebody waits for, as of hidden states: alone, and beside reads of weights."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from flexmoe.probing.disk import probe_directory, random_buffers
from flexmoe.probing.effort import Effort
from flexmoe.system.device import Device
from flexmoe.system.direct_io import PIECE_BYTES, READ_THREADS, DirectFile, DiskPool, Transfer
from flexmoe.system.trace import Recorder
from policies.common.memory_units import align_down

_SMALL_BYTES, _SMALL_TRANSFERS = 64 << 10, 128
#: Pieces of the file that is read meanwhile; as many are under way as keep every thread busy.
_PIECES = 4 * READ_THREADS
#: A slow disk serves few small transfers beside the large ones.
_LIMIT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds of a small transfer with nothing else under way, and the mean while the disk reads at its full rate."""

    alone_s: float
    busy_s: float


def disk_latency(device: Device, directory: Path, effort: Effort) -> Latency:
    """Write and read 64 KiB in turn, without and with reads at depth from the same disk.

    Raises:
        StorageError: the directory cannot be written or is full.
    """
    path, small = directory / f"latency-{os.getpid()}.bin", device.host_buffer(_SMALL_BYTES)
    piece = min(PIECE_BYTES, align_down(effort.buffer_bytes // _PIECES))
    buffers = random_buffers(device, piece, _PIECES)
    with probe_directory(directory), contextlib.closing(DirectFile(path, writable=True)) as file:
        os.unlink(path)
        for number, buffer in enumerate(buffers):
            file.write_from(memoryview(buffer.numpy()), number * piece)
        file.sync()
        start, view = _PIECES * piece, memoryview(small.numpy())
        alone_s = statistics.median(_small_transfers_s(file, view, start))
        with contextlib.closing(Reading(file, buffers, start)):
            return Latency(alone_s=alone_s, busy_s=statistics.fmean(_small_transfers_s(file, view, start)))


def _small_transfers_s(file: DirectFile, view: memoryview, start: int) -> list[float]:
    """Of one write and read each, the mean of both."""
    took_s, end_s = [], time.perf_counter() + _LIMIT_S
    for turn in range(_SMALL_TRANSFERS):
        begin = time.perf_counter()
        file.write_from(view, start + turn * _SMALL_BYTES)
        file.read_into(view, start + turn * _SMALL_BYTES)
        took_s.append((time.perf_counter() - begin) / 2)
        if time.perf_counter() > end_s:
            break
    return took_s


class Reading:
    """Reads without end, until it is closed: a file, again and again, as much at once as keeps all threads busy.

    Args:
        file: what is read.
        buffers: of one size; their memory is filled in turn.
        nbytes: bytes of the file, at least a buffer's.
    """

    def __init__(self, file: DirectFile, buffers: list[torch.Tensor], nbytes: int):
        self._file = file
        self._piece_bytes = min(PIECE_BYTES, len(buffers[0]))
        self._pieces = nbytes // self._piece_bytes
        starts = range(0, len(buffers[0]) // self._piece_bytes * self._piece_bytes, self._piece_bytes)
        memory = [memoryview(buffer.numpy()) for buffer in buffers]
        self._views = [each[start : start + self._piece_bytes] for each in memory for start in starts]
        self._depth = min(2 * READ_THREADS, len(self._views))
        self._error: BaseException | None = None
        self._ends, self._stopped = False, threading.Semaphore(0)
        self._pool = DiskPool(Recorder())
        for number in range(self._depth):
            self._submit(number)

    def close(self) -> None:
        """Wait for what is under way.

        Raises:
            StorageError: a read failed.
        """
        self._ends = True
        for _ in range(self._depth):
            self._stopped.acquire()
        self._pool.close()
        if self._error is not None:
            raise self._error

    def _submit(self, number: int, error: BaseException | None = None) -> None:
        self._error = self._error or error
        if self._ends or self._error is not None:
            self._stopped.release()
            return
        view, size = self._views[number % len(self._views)], self._piece_bytes
        piece = Transfer(self._file, number % self._pieces * size, view, size)
        self._pool.submit([piece], "probe", lambda failed: self._submit(number + self._depth, failed))
