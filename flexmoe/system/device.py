"""The compute device and the host memory that its copies touch.

One class for ``cuda`` and ``cpu``: on ``cpu`` streams and events are no-ops, because work is done when a call
returns. Nothing here ever synchronizes the whole device.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from cost_model.memory.memory_plan import allocator_bytes
from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.system.cuda_features import prepare_torch, warm_kernels
from flexmoe.system.link import Link
from flexmoe.system.machine import usable_cores
from flexmoe.system.trace import Recorder
from policies.common.memory_units import GIB, SYSTEM_PAGE_BYTES, align_down, align_up
from policies.common.option_names import option

_MADV_POPULATE_WRITE = 23
Stream: TypeAlias = "torch.cuda.Stream"
Event: TypeAlias = "torch.cuda.Event | NoEvent"
#: Kernels are loaded when they are first used; NVML counts them and torch does not.
_LATER_KERNELS_BYTES = 192 << 20
_DRIVING_CORES = 2
#: Bytes that were free of each GPU before this process used it.
_free_before: dict[torch.device, int] = {}


class NoEvent:
    """The event of a device whose work is complete when the call returns."""

    def record(self, stream: object = None) -> None:
        """Nothing to mark."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always passed."""
        return True


class Device:
    """A compute device with its streams, events and host buffers.

    Args:
        name: ``auto``, ``cuda``, ``cuda:N`` or ``cpu``.

    Attributes:
        torch: the `torch.device`.
        compute: the stream that all computing is ordered by, whatever thread issues it; None on cpu.
        link: what is under way up to it.
        host_waits: how often the calling thread waited for device work (a test holds it to one per MoE layer and half-block).
    """

    def __init__(self, name: str = "auto"):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            asked, other = option("device", "cuda"), option("device", "cpu")
            raise UsageError(f"{asked} was asked for, but torch finds no CUDA device; use {other}")
        if name.split(":")[0] not in ("cuda", "cpu"):
            raise UsageError(f"unknown device {name!r}: choose auto, cuda or cpu")
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self.host_waits, self.link = 0, Link()
        self._context_bytes: int | None = None
        if self.is_cuda:
            _leave_cores_to_the_device()
        if self.is_cuda:
            # Many functions of torch.cuda take no device without an index.
            self.torch = torch.device(
                "cuda", torch.cuda.current_device() if self.torch.index is None else self.torch.index
            )
            _note_free_memory(self.torch)
            prepare_torch()
        # The default one, in whose order memory that was allocated without a stream is freed.
        self.compute: Stream | None = torch.cuda.default_stream(self.torch) if self.is_cuda else None
        self.rebase()

    @property
    def kind(self) -> str:
        """``cuda`` or ``cpu``, as plans name it."""
        return "cuda" if self.is_cuda else "cpu"

    def stream(self, *, urgent: bool = False) -> Stream | None:
        """A new CUDA stream; None on cpu.

        Args:
            urgent: what is issued there goes before what waits on others.
        """
        return torch.cuda.Stream(self.torch, priority=-1 if urgent else 0) if self.is_cuda else None

    def on(self, stream: Stream | None) -> contextlib.AbstractContextManager[object]:
        """Context in which kernels, copies and allocations go to ``stream`` and its GPU; on cpu it does nothing."""
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def computing(self) -> contextlib.AbstractContextManager[object]:
        """Context of whatever computes: any thread may enter it, whatever its current GPU and stream are."""
        return self.on(self.compute)

    def rebase(self) -> None:
        """Match the clocks of host and device anew: events give their distance as float32 milliseconds, too coarse after hours.
        It waits for the compute stream, so it is for times when that is idle."""
        base = self.event(timing=True)
        base.record(self.compute)
        base.synchronize()
        self._base = (base, time.perf_counter())

    def event(self, timing: bool = False) -> Event:
        """A new, unrecorded event. Who waits for it sleeps: a core that spins is one less for attention on the CPU."""
        return torch.cuda.Event(enable_timing=timing, blocking=True) if self.is_cuda else NoEvent()

    def record(self, stream: Stream | None = None) -> Event:
        """An event recorded now on ``stream`` (None: the compute stream)."""
        event = self.event()
        event.record(stream or self.compute)
        return event

    def use_here(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, for use on the compute stream: when it is freed, its memory is not given to another tensor of the
        stream that made it before the compute stream has passed this use."""
        if self.compute is not None:
            tensor.record_stream(self.compute)
        return tensor

    def host_wait(self, event: Event) -> None:
        """Block the calling thread until ``event`` has passed, and count it."""
        self.host_waits += 1
        event.synchronize()

    @contextlib.contextmanager
    def timed(
        self, recorder: Recorder, lane: str, name: str, nbytes: int = 0, stream: Stream | None = None
    ) -> Iterator[None]:
        """Record the body's device work on ``stream`` (None: the compute stream) as a span of ``lane`` (host time on cpu, event
        times on CUDA)."""
        if not self.is_cuda:
            with recorder.span(lane, name, nbytes):
                yield
            return
        start, end = self.event(timing=True), self.event(timing=True)
        start.record(stream or self.compute)
        yield
        end.record(stream or self.compute)
        recorder.add_device(lane, name, *self._base, start, end, nbytes)

    def host_buffer(self, nbytes: int, *, pinned: bool = True, shared: bool = False) -> torch.Tensor:
        """Page-aligned host bytes, exactly as many pages as asked; registered with the driver on CUDA.

        Args:
            nbytes: size; rounded up to whole pages and no further (`Tensor.pin_memory` rounds to powers of two).
            pinned: register with the CUDA driver, so that copies are asynchronous. No effect on cpu.
            shared: back the pages by a memfd, so that another process can map them.

        Returns:
            torch.Tensor: uint8 ``[nbytes]``.

        Raises:
            InfeasibleError: the host has not that much memory, or the driver refuses to lock it.
        """
        size = max(SYSTEM_PAGE_BYTES, align_up(nbytes))
        try:
            pages = _map_pages(size, shared)
        except OSError as e:
            raise InfeasibleError(f"the host cannot provide {size / 2**30:.2f} GiB of memory: {e}") from e
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        if pinned and self.is_cuda:
            _populate(buffer.data_ptr(), size)
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
            if code != 0:
                _clear_error(self.torch)
                raise InfeasibleError(
                    f"the CUDA driver cannot lock {size / 2**30:.2f} GiB of host memory (error {code}); "
                    "raise the memlock limit or lower the CPU percents"
                )
            pages.registered_at = buffer.data_ptr()
        return buffer[:nbytes]

    def device_buffer(self, nbytes: int) -> torch.Tensor:
        """Uint8 ``[nbytes]`` on the compute device; on cpu, whole pages that take memory when they are written.

        Raises:
            InfeasibleError: the host has not that much memory.
        """
        if self.is_cuda:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch)
        return self.host_buffer(nbytes, pinned=False)

    @property
    def total_bytes(self) -> int | None:
        """Memory of the GPU, whoever uses it; None on a CPU."""
        return torch.cuda.mem_get_info(self.torch)[1] if self.is_cuda else None

    def room(self, budget_bytes: int) -> int:
        """What a budget for the whole process leaves for planned tensors: on CUDA the context with its kernels takes its share,
        and `allocator_bytes` of the budget stay free.

        Raises:
            InfeasibleError: they alone take more than the budget.
        """
        if not self.is_cuda:
            return budget_bytes
        context_bytes, kept_bytes = self._context(), allocator_bytes(budget_bytes)
        if context_bytes + kept_bytes >= budget_bytes:
            raise InfeasibleError(
                f"{option('gpu_mem')} of {budget_bytes / GIB:.2f} GiB is less than the {context_bytes / GIB:.2f} GiB "
                f"of the CUDA context and its kernels and the {kept_bytes / GIB:.2f} GiB that are kept for the allocator; "
                f"raise {option('gpu_mem')}"
            )
        return budget_bytes - context_bytes - kept_bytes

    def _context(self) -> int:
        """GPU memory of the CUDA context and of kernels, those that are loaded later included; measured once."""
        if self._context_bytes is None:
            self._context_bytes = _context_bytes(self.torch) + _LATER_KERNELS_BYTES
        return self._context_bytes

    def cap_memory(self, budget_bytes: int | None) -> None:
        """Hold the whole process on the GPU, CUDA context included, to ``budget_bytes``; None lifts an earlier engine's cap.

        Raises:
            InfeasibleError: the CUDA context and what is kept for the allocator take more than the budget.
        """
        if not self.is_cuda:
            return
        share = 1.0
        if budget_bytes is not None:
            self.room(budget_bytes)
            share = min(1.0, (budget_bytes - self._context()) / torch.cuda.mem_get_info(self.torch)[1])
        torch.cuda.set_per_process_memory_fraction(share, self.torch)


class _Pages(mmap.mmap):
    """Memory that is unregistered from the driver before it is unmapped: a registered address cannot be locked again."""

    registered_at = 0

    def __del__(self) -> None:
        if self.registered_at:
            with contextlib.suppress(Exception):  # at the interpreter's end torch may be gone already
                torch.cuda.cudart().cudaHostUnregister(self.registered_at)


def _map_pages(size: int, shared: bool) -> _Pages:
    if shared:
        fd = os.memfd_create("flexmoe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return _Pages(fd, size)
        finally:
            os.close(fd)
    pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages serves small ones
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _populate(address: int, size: int) -> None:
    """Let several threads fault the pages in; the driver would do it with one, at 1 to 2 GB/s."""
    madvise, step = ctypes.CDLL(None, use_errno=True).madvise, 256 << 20
    if size < 2 * step:
        return
    pieces = [(address + at, min(step, size - at)) for at in range(0, size, step)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # kernels before 5.14 refuse, and nothing is lost
        list(pool.map(lambda p: madvise(ctypes.c_void_p(p[0]), ctypes.c_size_t(p[1]), _MADV_POPULATE_WRITE), pieces))


def _context_bytes(device: torch.device) -> int:
    """GPU memory that the process holds beside torch's tensors, once libraries and common kernels are loaded."""
    warm_kernels(device)
    return _held_bytes(device) - torch.cuda.memory_reserved(device)


def _held_bytes(device: torch.device) -> int:
    """Bytes of GPU memory that this process holds; those of others too where nothing tells them apart."""
    free, total = torch.cuda.mem_get_info(device)
    return process_gpu_bytes(device) or _free_before.get(device, total) - free


def _note_free_memory(device: torch.device) -> None:
    """Remember what was free of a GPU before this process had a context there; NVML makes none."""
    with contextlib.suppress(_NoNVML), _nvml(device) as (nvml, handle):
        if device not in _free_before and not torch._C._cuda_hasPrimaryContext(device.index):  # type: ignore[attr-defined]
            _free_before[device] = nvml.nvmlDeviceGetMemoryInfo(handle).free


def process_gpu_bytes(device: torch.device) -> int | None:
    """Bytes of GPU memory that this process holds, as NVML counts them; None where NVML cannot tell, as in a container."""
    with contextlib.suppress(_NoNVML), _nvml(device) as (nvml, handle):
        mine = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        return mine[0].usedGpuMemory or None if mine else None
    return None


class _NoNVML(Exception):
    """NVML is not there, or does not know."""


@contextlib.contextmanager
def _nvml(device: torch.device) -> Iterator[tuple[Any, Any]]:
    """NVML and its handle of a GPU. It counts all of the machine's, and torch those that CUDA_VISIBLE_DEVICES leaves: the two agree
    on UUIDs alone.

    Raises:
        _NoNVML: it is not installed, or it reports an error.
    """
    try:
        import pynvml
    except ImportError as e:
        raise _NoNVML from e
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as e:
        raise _NoNVML from e


def _leave_cores_to_the_device() -> None:
    """Let operators on the host take all cores but two: one issues the device's work and one feeds its link. Every lane's thread
    has a team of so many threads, as torch asks for them when a thread computes for the first time."""
    torch.set_num_threads(min(torch.get_num_threads(), max(1, usable_cores() - _DRIVING_CORES)))


def _clear_error(device: torch.device) -> None:
    """Take the error of a call that failed off the CUDA runtime, which otherwise reports it to whatever is launched next."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def forget_pages(address: int, size: int) -> None:
    """Give back the whole pages within host bytes that nobody needs; they read as zeros and take memory when written again."""
    first, end = align_up(address), align_down(address + size)
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def give_back_freed_memory() -> None:
    """Let the C library give freed memory that it keeps back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers of up to 32 MiB instead of unmapping them: on cpu a sweep otherwise spends its
    time in page faults of short-lived activations."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 256 << 20)
