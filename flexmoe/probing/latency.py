"""What transfers cost beside their bytes: a small one that somebody waits for, and large ones on cores that compute.

The second is found by sweeps of a model of some size. Weights are copied from host memory or read from disk while the engine
computes with those that are there. On device cpu the cores do both: the CPU time of the moving threads says too little of what
that costs, as it misses interrupts, the traffic in memory, and that a GEMM of all threads is as slow as the one whose core is
shared. So sweeps are compared that differ in nothing but where weights are.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cost_model.memory.allocation import PAGE_TOKENS, residency
from cost_model.model.arch import ModelArch
from flexmoe.probing.disk import probe_directory, random_buffers
from flexmoe.probing.effort import Effort
from flexmoe.probing.gemms import bench_arch
from flexmoe.probing.sweeps import gpu_batches, timed_sweeps
from flexmoe.system.device import Device
from flexmoe.system.direct_io import READ_THREADS, SHARED_PIECE_BYTES, DirectFile, DiskPool, Transfer
from flexmoe.system.machine import usable_cores
from flexmoe.system.trace import Recorder
from policies.common.memory_units import align_down

_SMALL_BYTES, _SMALL_TRANSFERS = 64 << 10, 128
#: Of reads beside products: points of time that a rate takes, rows, and both sizes of the weights, more than a core's cache.
_POINTS, _PRODUCT_ROWS, _PRODUCT_SIZE = 3, 256, 2048
#: Pieces of the file that is read meanwhile; as many are under way as keep every thread busy.
_PIECES = 4 * READ_THREADS
#: A slow disk serves few small transfers beside the large ones.
_LIMIT_S = 3.0
_LAYERS = 4
#: Layers of the models whose weights are moved: fewer, so that larger experts fit.
_MOVED_LAYERS = 2
#: The disk is to read for no longer than this part of a sweep, and at most this percentage of the weights.
_DISK_BUSY, _DISK_PERCENT = 0.6, 50.0
_ROUNDS, _KV_ROUNDS = 9, 3
#: Tokens of a row whose KV takes next to no time.
_SHORT = 8


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
    with read_file(device, directory, effort) as (file, buffers, nbytes):
        view = device.host_buffer(_SMALL_BYTES).numpy().data
        alone_s = statistics.median(_small_transfers_s(file, view, nbytes))
        with contextlib.closing(Reading(file, buffers, nbytes)):
            return Latency(alone_s=alone_s, busy_s=statistics.fmean(_small_transfers_s(file, view, nbytes)))


def reading_beside_compute(device: Device, directory: Path, effort: Effort) -> float:
    """The part of its rate that reading keeps while products take all cores: the mean ratio of both rates, taken in turn.

    Raises:
        StorageError: the directory cannot be written or is full.
    """
    ratios = []
    with contextlib.ExitStack() as stack:
        reading = stack.enter_context(
            contextlib.closing(Reading(*stack.enter_context(read_file(device, directory, effort))))
        )
        for _ in range(_ROUNDS):
            alone, beside = (_read_rate(reading, work, _POINTS * effort.point_s) for work in (time.sleep, compute))
            ratios.append(beside / alone)
    return min(1.0, statistics.fmean(ratios))


def _read_rate(reading: Reading, work: Callable[[float], None], seconds: float) -> float:
    """Bytes per second beside ``work``, one at least."""
    before, begin = reading.bytes_read, time.perf_counter()
    work(seconds)
    return max(1, reading.bytes_read - before) / (time.perf_counter() - begin)


def compute(seconds: float) -> None:
    """Products that keep all cores busy for so long."""
    weights, end_s = torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE), time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        torch.mm(weights[:_PRODUCT_ROWS], weights)


@contextlib.contextmanager
def read_file(device: Device, directory: Path, effort: Effort) -> Iterator[tuple[DirectFile, list[torch.Tensor], int]]:
    """A file that is gone afterwards, buffers of one size and the bytes that are written: a buffer after the other."""
    path = directory / f"latency-{os.getpid()}.bin"
    piece = min(SHARED_PIECE_BYTES, align_down(effort.buffer_bytes // _PIECES))
    buffers = random_buffers(device, piece, _PIECES)
    with probe_directory(directory), contextlib.closing(DirectFile(path, writable=True)) as file:
        os.unlink(path)
        for number, buffer in enumerate(buffers):
            file.write_from(buffer.numpy().data, number * piece)
        file.sync()
        yield file, buffers, _PIECES * piece


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

    It is complete when the first piece has been read, so that what is timed beside it is beside reads that have begun.

    Args:
        file: what is read.
        buffers: of one size; their memory is filled in turn.
        nbytes: bytes of the file, at least a buffer's.
    """

    def __init__(self, file: DirectFile, buffers: list[torch.Tensor], nbytes: int):
        self._file = file
        self._piece_bytes = min(SHARED_PIECE_BYTES, len(buffers[0]))
        self._pieces = nbytes // self._piece_bytes
        starts = range(0, len(buffers[0]) // self._piece_bytes * self._piece_bytes, self._piece_bytes)
        memory = [buffer.numpy().data for buffer in buffers]
        self._views = [each[start : start + self._piece_bytes] for each in memory for start in starts]
        self._depth = min(2 * READ_THREADS, len(self._views))
        self._error: BaseException | None = None
        self._ends, self._begun, self._stopped = False, threading.Event(), threading.Semaphore(0)
        self._recorder = Recorder()
        self._pool = DiskPool(self._recorder)
        for number in range(self._depth):
            self._submit(number)
        self._begun.wait()

    @property
    def bytes_read(self) -> int:
        """So far."""
        return self._recorder.totals()["disk_read"].nbytes

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
        self._pool.submit([piece], "probe", lambda failed: self._read(number, failed))

    def _read(self, number: int, error: BaseException | None) -> None:
        self._begun.set()
        self._submit(number + self._depth, error)


def handoff_s(device: Device, dtype: torch.dtype, directory: Path, effort: Effort) -> float:
    """What a transfer of KV takes in a running engine beyond a few bytes: calls, on device cuda of a thread that shares the interpreter.

    The lanes' own seconds per operation, with many GPU batches of short rows that fetch and store their KV.
    """
    arch, rows, batch_rows = streaming_arch(dtype, effort), max(effort.rows), min(effort.batch_rows)
    timed = timed_sweeps(
        device, arch, dtype, rows, batch_rows, directory, effort.sweeps, cache=(0, 100), context=_SHORT
    )
    operations = 2 * arch.num_layers * len(gpu_batches(rows, batch_rows))  # a load and a store
    return (timed.lanes_s["h2d"] + timed.lanes_s["d2h"]) / operations


def streaming_core_s_per_byte(
    device: Device, dtype: torch.dtype, directory: Path, effort: Effort, disk_bytes_per_s: float
) -> dict[str, float]:
    """Core-seconds that a weight byte takes from computing, by the tier (`cpu`, `disk`) that it comes from.

    Sweeps with weights in host memory, on disk, and all resident, in turn: where they last A seconds when all weights
    are resident, and B with so many bytes elsewhere, a byte takes cores · (B - A) / bytes: the median over rounds, the mean
    over two sizes of experts. All rows are one GPU batch and few enough that the bytes show: a sweep of many rows is so much
    longer than its copies that the drift of the cores' speed hides them.

    Args:
        directory: of the engine's disk tier.
        disk_bytes_per_s: the disk's rate; no more is put there than it reads in a part of a sweep.
    """
    found = [
        _core_s_per_byte(device, arch, dtype, directory, effort, disk_bytes_per_s)
        for arch in moved_archs(dtype, effort)
    ]
    return {tier: statistics.fmean(each[tier] for each in found) for tier in found[0]}


def kv_block_core_s(device: Device, dtype: torch.dtype, directory: Path, effort: Effort) -> float:
    """Core-seconds that a read of KV takes from computing, its bytes included.

    The CPU time of a read says too little: threads are woken for each, and want the interpreter. Sweeps of rows that have written
    their first page to disk are compared with those that have it in host memory. The computation alone is, without what it waits
    for: cores · difference / reads, the median over rounds.

    Args:
        directory: of the engine's disk tier.
    """
    arch, rows, batch_rows = streaming_arch(dtype, effort), moved_rows(effort), min(effort.batch_rows)
    costs = []
    for _ in range(_KV_ROUNDS):
        on_host_s, on_disk_s = (
            timed_sweeps(
                device,
                arch,
                dtype,
                rows,
                batch_rows,
                directory,
                effort.sweeps,
                cache=cache,
                context=_SHORT,
                warm=PAGE_TOKENS,
            ).lanes_s["gpu"]
            for cache in ((0, 100), (0, 0))
        )
        costs.append(usable_cores() * (on_disk_s - on_host_s) / (arch.num_layers * rows))
    return max(0.0, statistics.median(costs))


def moved_rows(effort: Effort) -> int:
    """Rows of the sweeps beside which weights are moved."""
    return sorted(effort.rows)[len(effort.rows) // 2]


def _core_s_per_byte(
    device: Device,
    arch: ModelArch,
    dtype: torch.dtype,
    directory: Path,
    effort: Effort,
    disk_bytes_per_s: float,
) -> dict[str, float]:
    rows = moved_rows(effort)

    def sweep_s(gpu: float, cpu: float) -> float:
        timed = timed_sweeps(
            device, arch, dtype, rows, rows, directory, effort.sweeps, weights=(gpu, cpu), context=_SHORT
        )
        return timed.sweep_s

    resident_s = [sweep_s(100, 0)]
    share = 100 * _DISK_BUSY * resident_s[0] * disk_bytes_per_s / arch.total_bytes
    away = {"cpu": (0.0, 100.0), "disk": (100 - min(_DISK_PERCENT, share), 0.0)}
    moved = {tier: residency(arch).place(*percents).bytes_of(tier) for tier, percents in away.items()}
    costs: dict[str, list[float]] = {tier: [] for tier in away}
    for _ in range(_ROUNDS):
        away_s = {tier: sweep_s(*percents) for tier, percents in away.items()}
        resident_s.append(sweep_s(100, 0))
        alone_s = statistics.fmean(resident_s[-2:])  # before and after: the machine's speed may change
        for tier, each_s in away_s.items():
            costs[tier].append(usable_cores() * (each_s - alone_s) / moved[tier] if moved[tier] else 0.0)
    return {tier: max(0.0, statistics.median(each)) for tier, each in costs.items()}


def streaming_arch(dtype: torch.dtype, effort: Effort) -> ModelArch:
    """The largest of the measured experts, with the attention module of its hidden size, of which a model of a few layers fits
    half of the buffers."""
    return _fitting_archs(dtype, effort, _LAYERS)[-1]


def moved_archs(dtype: torch.dtype, effort: Effort) -> list[ModelArch]:
    """The same of fewer layers, with the two largest experts that fit."""
    return _fitting_archs(dtype, effort, _MOVED_LAYERS)[-2:]


def _fitting_archs(dtype: torch.dtype, effort: Effort, layers: int) -> list[ModelArch]:
    modules = {heads.hidden: heads for heads in effort.modules}
    shapes = [bench_arch(modules[hidden], ffn, layers=layers) for hidden, ffn in effort.experts if hidden in modules]
    fits = [s for s in shapes if s.total_bytes // s.dtype_bytes * dtype.itemsize <= effort.buffer_bytes // 2]
    return fits or shapes[:1]
