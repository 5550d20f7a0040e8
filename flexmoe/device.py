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

import torch

from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.trace import Recorder

PAGE_BYTES = mmap.PAGESIZE


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
        host_waits: how often the calling thread waited for device work (a test holds it to one per MoE layer).
    """

    def __init__(self, name: str = "auto"):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError("--device cuda was asked for, but torch finds no CUDA device; use --device cpu")
        if name.split(":")[0] not in ("cuda", "cpu"):
            raise UsageError(f"unknown device {name!r}: choose auto, cuda or cpu")
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self.host_waits = 0
        if self.is_cuda:
            torch.cuda.set_device(self.torch)
        self._base = self.event(timing=True)
        self._base.record()
        if self.is_cuda:
            self._base.synchronize()
        self._base_s = time.perf_counter()

    def stream(self):
        """A new CUDA stream; None on cpu."""
        return torch.cuda.Stream(self.torch) if self.is_cuda else None

    def on(self, stream):
        """Context in which kernels and copies go to ``stream`` (None: the current one)."""
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def event(self, timing: bool = False):
        """A new, unrecorded event."""
        return torch.cuda.Event(enable_timing=timing) if self.is_cuda else NoEvent()

    def record(self, stream=None):
        """An event recorded now on ``stream`` (None: the current one)."""
        event = self.event()
        event.record(stream) if stream is not None else event.record()
        return event

    def host_wait(self, event) -> None:
        """Block the calling thread until ``event`` has passed, and count it."""
        self.host_waits += 1
        event.synchronize()

    @contextlib.contextmanager
    def timed(self, recorder: Recorder, lane: str, name: str, nbytes: int = 0, stream=None):
        """Record the body's device work as a span of ``lane`` (host time on cpu, event times on CUDA)."""
        if not self.is_cuda:
            with recorder.span(lane, name, nbytes):
                yield
            return
        start, end = self.event(timing=True), self.event(timing=True)
        start.record(stream or torch.cuda.current_stream())
        yield
        end.record(stream or torch.cuda.current_stream())
        recorder.add_device(lane, name, self._base, self._base_s, start, end, nbytes)

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
        size = max(PAGE_BYTES, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)
        try:
            pages = _map_pages(size, shared)
        except OSError as e:
            raise InfeasibleError(f"the host cannot provide {size / 2**30:.2f} GiB of memory: {e}") from e
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        if pinned and self.is_cuda:
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
            if code != 0:
                raise InfeasibleError(
                    f"the CUDA driver cannot lock {size / 2**30:.2f} GiB of host memory (error {code}); "
                    "raise the memlock limit or lower the CPU percents"
                )
        return buffer[:nbytes]

    def cap_memory(self, budget_bytes: int) -> None:
        """Hold the whole process on the GPU, CUDA context included, to ``budget_bytes``.

        Raises:
            InfeasibleError: the CUDA context alone takes more than the budget.
        """
        if not self.is_cuda:
            return
        torch.zeros(1, device=self.torch)
        free, total = torch.cuda.mem_get_info(self.torch)
        context = process_gpu_bytes(self.torch) or (total - free)
        context -= torch.cuda.memory_reserved(self.torch)
        room = budget_bytes - context
        if room <= 0:
            raise InfeasibleError(
                f"--gpu-mem of {budget_bytes / 2**30:.2f} GiB is less than the CUDA context's {context / 2**30:.2f} GiB"
            )
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), self.torch)


def _map_pages(size: int, shared: bool) -> mmap.mmap:
    if shared:
        fd = os.memfd_create("flexmoe", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages serves small ones
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def process_gpu_bytes(device: torch.device) -> int | None:
    """Bytes of GPU memory that this process holds, as NVML counts them; None where NVML cannot tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except pynvml.NVMLError:
        return None
    return mine[0].usedGpuMemory if mine and mine[0].usedGpuMemory else None


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers of up to 32 MiB instead of unmapping them: on cpu a sweep otherwise spends its
    time in page faults of short-lived activations."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 256 << 20)
