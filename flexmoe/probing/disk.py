"""Disk rates and what a byte costs the cores, through the runtime's disk threads into memory like that of its slots."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cost_model.hardware.link_curves import LinkCurve
from flexmoe.errors import StorageError
from flexmoe.probing.effort import Effort
from flexmoe.probing.timing import mean_of_rounds
from flexmoe.system.device import Device
from flexmoe.system.direct_io import PIECE_BYTES, DirectFile, DiskPool, Pending, Transfer
from flexmoe.system.machine import free_disk_bytes
from flexmoe.system.trace import Recorder
from policies.common.memory_units import SYSTEM_PAGE_BYTES, align_down
from policies.common.option_names import option

_UNIT_BYTES = 64 << 20
_IN_FLIGHT = 8
#: Of the curve: as many units are under way as there are weight slots by default.
_SLOTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """A transfer: bytes, seconds, and core-seconds of this process meanwhile."""

    nbytes: int
    seconds: float
    core_s: float

    @property
    def bytes_per_s(self) -> float:
        """The rate."""
        return self.nbytes / self.seconds

    @property
    def core_s_per_byte(self) -> float:
        """What a byte costs the cores."""
        return self.core_s / self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Writes, flushed to the device, and reads; ``direct`` unless the file system went through the page cache.

    ``curve``: reads of smaller and larger units, fewer of them under way.
    """

    read: Transferred
    write: Transferred
    direct: bool
    curve: LinkCurve = ()


def disk_rates(device: Device, directory: Path, effort: Effort) -> DiskRates:
    """Write a file and read it back. The file has no name, so nothing is left of it even when the process is killed.

    Raises:
        StorageError: the directory cannot be written, or has too little free space: a tenth of it is used at most.
    """
    with probe_directory(directory):
        size = file_bytes(directory, effort)
        unit = min(_UNIT_BYTES, max(SYSTEM_PAGE_BYTES, align_down(min(effort.buffer_bytes // 2, size) // _IN_FLIGHT)))
        buffers = random_buffers(device, unit, _IN_FLIGHT)
        with _nameless_file(directory) as (file, drop_cache):
            write = transfer("disk_write", file, buffers, size, effort.disk_s)
            drop_cache()
            read = transfer("disk_read", file, buffers, write.nbytes, effort.disk_s)
            curve = _read_curve(file, buffers, write.nbytes, effort)
            return DiskRates(read=read, write=write, direct=file.direct, curve=curve)


def _read_curve(file: DirectFile, buffers: list[torch.Tensor], nbytes: int, effort: Effort) -> LinkCurve:
    """Bytes/s of reads by the bytes of a unit, each the mean of rounds that read other parts of the file."""
    sizes = [size for size in effort.link_bytes if size <= min(buffers[0].numel(), nbytes // _SLOTS)]
    start = 0

    def rate(size: int) -> float:
        nonlocal start
        if nbytes - start < _SLOTS * size:
            start = 0
        slots = [buffer[:size] for buffer in buffers[:_SLOTS]]
        done = transfer("disk_read", file, slots, nbytes - start, effort.point_s, start)
        start += done.nbytes
        return done.bytes_per_s

    return mean_of_rounds(sizes, rate)


def transfer(
    lane: str, file: DirectFile, buffers: list[torch.Tensor], nbytes: int, seconds: float, start: int = 0
) -> Transferred:
    """Move units between ``file`` and the buffers in turn, all buffers being under way; what is written is flushed.

    Args:
        lane: ``disk_read`` or ``disk_write``.
        nbytes: as many whole units as this holds are moved,
        seconds: or as many as were started in this time.
        start: where in the file, a whole number of pages.
    """
    pool, size = DiskPool(Recorder(), lane), buffers[0].numel()
    begin_s, begin_core_s = time.perf_counter(), time.process_time()
    pending: list[Pending] = []
    try:
        for i in range(max(1, nbytes // size)):
            if i >= len(buffers):
                pending[i - len(buffers)].wait()
                if time.perf_counter() - begin_s > seconds:
                    break
            piece = Transfer(file, start + i * size, buffers[i % len(buffers)].numpy().data, size)
            pending.append(pool.submit([piece], lane))
        for each in pending:
            each.wait()
        if lane == "disk_write":
            file.sync()
        took_s, core_s = time.perf_counter() - begin_s, time.process_time() - begin_core_s
    finally:
        pool.close()
    return Transferred(nbytes=len(pending) * size, seconds=took_s, core_s=core_s)


def random_buffers(device: Device, nbytes: int, count: int) -> list[torch.Tensor]:
    """Host buffers with distinct bytes that nothing can compress."""
    buffers = [device.host_buffer(nbytes) for _ in range(count)]
    noise = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    for number, buffer in enumerate(buffers):
        np.bitwise_xor(noise, number, out=buffer.numpy())
    return buffers


@contextlib.contextmanager
def probe_directory(directory: Path) -> Iterator[None]:
    """The directory exists meanwhile; what had to be made for it is removed again.

    Raises:
        StorageError: it cannot be made.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create the directory {directory}: {error.strerror}; choose another {option('directory')}"
        ) from error
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # somebody else may use it by now
                path.rmdir()


def file_bytes(directory: Path, effort: Effort) -> int:
    """Size of a file that the probe may write: a tenth of the free space at most.

    Raises:
        StorageError: that is too little.
    """
    free = free_disk_bytes(directory)
    size = min(effort.disk_bytes, free // 10) // PIECE_BYTES * PIECE_BYTES
    if size < effort.least_disk_bytes:
        raise StorageError(
            f"{directory} has {free / 2**20:.0f} MiB free, and the probe writes a file of a tenth of that at most, at "
            f"least {effort.least_disk_bytes / 2**20:.0f} MiB; free some space or choose another "
            f"{option('directory')}"
        )
    return size


@contextlib.contextmanager
def _nameless_file(directory: Path) -> Iterator[tuple[DirectFile, Callable[[], None]]]:
    """A file without a name, and what makes the kernel drop its cached pages (O_DIRECT leaves none)."""
    path = directory / f"probe-{os.getpid()}-{time.monotonic_ns()}.bin"
    file = DirectFile(path, writable=True)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.unlink(path)
    try:
        yield file, lambda: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
        file.close()
