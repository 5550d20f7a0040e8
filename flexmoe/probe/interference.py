"""What the disk's bytes take from computing: how much slower experts are computed while it reads at its full rate.

The CPU time of this process says less: it misses interrupts and the traffic in memory.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable

import torch

from flexmoe.device import Device
from flexmoe.machine import usable_cores
from flexmoe.probe.buffers import WeightArena
from flexmoe.probe.effort import Effort, Heads
from flexmoe.probe.gemms import bench_arch, expert_bench
from flexmoe.probe.timing import mean_s
from flexmoe.storage import PIECE_BYTES, READ_THREADS, DirectFile, DiskPool, Transfer
from flexmoe.trace import Recorder

#: Few tokens wait for memory, many for arithmetic.
TOKENS = (16, 256)
#: Experts that the weights are taken from in turn.
_SETS = 8
#: Many short slices: some of them meet no other process.
_ROUNDS, _SLICE_POINTS = 20, 0.4
#: A slow disk takes long to finish what is under way after each slice.
_LIMIT_POINTS = 40


class Reading:
    """Reads without end, until it is closed: a file, again and again, as much at once as keeps all threads busy.

    Args:
        file: what is read.
        buffers: of one size; their memory is filled in turn.
        nbytes: bytes of the file, at least a buffer's.
    """

    def __init__(self, file: DirectFile, buffers: list[torch.Tensor], nbytes: int):
        self._recorder, self._file = Recorder(), file
        self._piece_bytes = min(PIECE_BYTES, len(buffers[0]))
        self._pieces = nbytes // self._piece_bytes
        starts = range(0, len(buffers[0]) // self._piece_bytes * self._piece_bytes, self._piece_bytes)
        memory = [memoryview(buffer.numpy()) for buffer in buffers]
        self._views = [each[start : start + self._piece_bytes] for each in memory for start in starts]
        self._depth = min(2 * READ_THREADS, len(self._views))
        self._error: BaseException | None = None
        self._ends, self._stopped = False, threading.Semaphore(0)
        self._pool = DiskPool(self._recorder)
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

    def beside(self, work: Callable[[], float]) -> tuple[float, float]:
        """What ``work`` gives, and bytes/s read meanwhile."""
        before, begin_s = self._read_bytes(), time.perf_counter()
        result = work()
        return result, (self._read_bytes() - before) / (time.perf_counter() - begin_s)

    def _submit(self, number: int, error: BaseException | None = None) -> None:
        self._error = self._error or error
        if self._ends or self._error is not None:
            self._stopped.release()
            return
        view, size = self._views[number % len(self._views)], self._piece_bytes
        piece = Transfer(self._file, number % self._pieces * size, view, size)
        self._pool.submit([piece], "probe", lambda failed: self._submit(number + self._depth, failed))

    def _read_bytes(self) -> int:
        return sum(totals.nbytes for totals in self._recorder.totals().values())


def read_core_s_per_byte(
    dtype: torch.dtype, file: DirectFile, buffers: list[torch.Tensor], nbytes: int, effort: Effort
) -> float:
    """Core-seconds that reading a byte takes from experts which are computed by all threads meanwhile; 0 if none.

    Where a call takes A seconds alone and B beside reads at R bytes/s, that is cores · (1 - A/B) / R; the mean over
    `TOKENS`. A and B are the fastest of slices in turn, each the mean over its calls: others disturb only some of them.
    """
    cpu = Device("cpu")
    arena = WeightArena(cpu, dtype, min(effort.cycle_bytes, effort.buffer_bytes // 4))
    shapes = [bench_arch(Heads(hidden=hidden, heads=1, kv_heads=1, head_dim=2), ffn) for hidden, ffn in effort.experts]
    room = arena.nbytes // dtype.itemsize // _SETS
    arch = ([shape for shape in shapes if shape.expert_params <= room] or shapes[:1])[-1]
    with expert_bench(cpu, arch, dtype, arena, max(TOKENS), effort, timed=mean_s) as seconds:

        def cost(count: int) -> float:
            slice_s, limit_s = _SLICE_POINTS * effort.point_s, _LIMIT_POINTS * effort.point_s
            return _cost(lambda: seconds(count, slice_s, 1, 1), lambda: Reading(file, buffers, nbytes), limit_s)

        return statistics.fmean(map(cost, TOKENS))


def _cost(call_s: Callable[[], float], reading: Callable[[], Reading], limit_s: float) -> float:
    """Core-seconds per byte beside one kind of call; no new round begins after ``limit_s``."""
    alone, beside, end_s = [], [], time.perf_counter() + limit_s
    while len(alone) < _ROUNDS and (not alone or time.perf_counter() < end_s):
        alone.append(call_s())
        with contextlib.closing(reading()) as reads:
            beside.append(reads.beside(call_s))
    bytes_per_s = statistics.fmean(rate for _, rate in beside)
    lost = max(0.0, 1 - min(alone) / min(beside)[0])
    return usable_cores() * lost / bytes_per_s if bytes_per_s else 0.0
