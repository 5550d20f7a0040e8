"""What the machine gives without any engine: disk rate, GEMM rate, memory of a process, and what the machine is."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from flexmoe.system.machine import instruction_set, usable_cores
from policies.common.memory_units import SYSTEM_PAGE_BYTES

if TYPE_CHECKING:
    import torch

READ_THREADS = (1, 2, 4)
READ_SIZES = (4 << 20, 16 << 20)
RING_BYTES = 64 << 20  # more than a cache holds: weights that land in a cache and are overwritten there are no use
_TURNS = 7  # of which the faster way to take products is chosen
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


class DirectReader:
    """The files as one run of bytes, read with O_DIRECT in pieces that do not cross a file's end.

    Raises:
        OSError: a file cannot be opened for direct reads; a buffered rate would measure the page cache.
    """

    def __init__(self, paths: Sequence[str]):
        self._files = [os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC) for path in sorted(paths)]
        self._sizes = [os.fstat(file).st_size // SYSTEM_PAGE_BYTES * SYSTEM_PAGE_BYTES for file in self._files]
        self.total_bytes = sum(self._sizes)

    def read_into(self, buffer: memoryview, start: int) -> int:
        """Fill `buffer` from byte `start` of the run (which wraps round); returns the bytes read, maybe fewer."""
        start %= self.total_bytes
        for file, size in zip(self._files, self._sizes, strict=True):
            if start < size:
                return os.preadv(file, [buffer[: size - start]], start)
            start -= size
        raise AssertionError("unreachable: the start lies within the run")

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)


def disk_rate(paths: Sequence[str], each_bytes: int) -> dict:
    """The best O_DIRECT read rate over thread counts and piece sizes; each combination reads another part of the files.

    Returns:
        dict: `best` in bytes/s, the `threads` and `piece_bytes` that reached it, and `rates` by "threads x MiB".
    """
    reader = DirectReader(paths)
    each_bytes = min(each_bytes, reader.total_bytes)
    rates = {
        (threads, size): read_rate(reader, threads, size, number * each_bytes, each_bytes)
        for number, (threads, size) in enumerate(itertools.product(READ_THREADS, READ_SIZES))
    }
    reader.close()
    best = max(rates, key=rates.__getitem__)
    named = {f"{threads} x {size >> 20} MiB": rate for (threads, size), rate in rates.items()}
    return {"best": rates[best], "threads": best[0], "piece_bytes": best[1], "rates": named}


def huge_buffer(nbytes: int) -> mmap.mmap:
    """Private memory in huge pages, touched: a device fills scattered small pages at less than half the rate."""
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages gives what it has
        buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(bytes(nbytes))
    return buffer


def read_rate(reader: DirectReader, threads: int, size: int, start: int, total_bytes: int) -> float:
    """Bytes/s of threads that read pieces of `size` bytes, `total_bytes` from byte `start` of the files."""
    first = start // SYSTEM_PAGE_BYTES * SYSTEM_PAGE_BYTES
    pieces = iter(enumerate(range(first, start + total_bytes, size)))
    ring, slots = memoryview(huge_buffer(RING_BYTES)), RING_BYTES // size
    lock, done = threading.Lock(), []

    def work() -> None:
        read = 0
        while True:
            with lock:
                number, offset = next(pieces, (0, None))
            if offset is None:
                break
            slot = number % slots * size
            read += reader.read_into(ring[slot : slot + size], offset)
        with lock:
            done.append(read)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - begin)


class Products:
    """The three products of an expert, bf16, on all cores, with weights that no cache holds: torch's, and the native call that takes
    them and the gate at once, where the machine has it.

    Args:
        experts: different experts to cycle over; 0 takes 1 GiB of them.
    """

    def __init__(self, hidden: int, ffn: int, experts: int = 0) -> None:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        experts = experts or max(2, (1 << 30) // (6 * hidden * ffn))
        first = [torch.randn(ffn, hidden), torch.randn(ffn, hidden), torch.randn(hidden, ffn)]
        self._weights = itertools.cycle(
            [tuple(w.to(torch.bfloat16) / hidden**0.5 for w in first) for _ in range(experts)],
        )
        self._hidden, self._flops = hidden, 6 * hidden * ffn
        self._fastest: dict[int, int] = {}

    def rate(self, tokens: int, seconds: float) -> float:
        """FLOP/s over so many tokens, of the way that is faster with them: chosen once, in turns, by medians."""
        import torch

        from flexmoe.kernels.native.feed_forward import can_feed_forward, feed_forward

        x_TD = torch.randn(tokens, self._hidden).to(torch.bfloat16)
        y_TD, weights = torch.zeros_like(x_TD), next(self._weights)
        ways = [_torch_products]
        if can_feed_forward(x_TD, y_TD, *weights):
            ways.append(lambda x, own: feed_forward(x, y_TD, own))
        with torch.inference_mode():
            if tokens not in self._fastest:
                rounds = [[self._rate(way, x_TD, seconds / 4) for way in ways] for _ in range(_TURNS)]
                rates = [statistics.median(of_one) for of_one in zip(*rounds)]
                self._fastest[tokens] = rates.index(max(rates))
            return self._rate(ways[self._fastest[tokens]], x_TD, seconds)

    def _rate(self, way: Callable, x_TD: torch.Tensor, seconds: float) -> float:
        """Of at least two experts, behind two that are not counted."""
        begin, calls = 0.0, 0
        for number, weights in enumerate(self._weights):
            if number == 2:
                begin = time.perf_counter()
            way(x_TD, weights)
            calls = max(0, number - 1)
            if calls >= 2 and time.perf_counter() - begin > seconds:
                break
        return calls * len(x_TD) * self._flops / (time.perf_counter() - begin)


def _torch_products(x_TD: torch.Tensor, weights: tuple) -> None:
    from torch.nn.functional import linear

    gate_FD, up_FD, down_DF = weights
    h_TF = linear(x_TD, gate_FD)
    linear(x_TD, up_FD)
    linear(h_TF, down_DF)


def gemm_rate(tokens: int, hidden: int, ffn: int, seconds: float, experts: int = 0) -> float:
    """`Products.rate` of new weights."""
    return Products(hidden, ffn, experts).rate(tokens, seconds)


class Repeater:
    """Calls a function every `interval_s` in a thread until `stop`."""

    def __init__(self, function: Callable[[], None], interval_s: float):
        self._function, self._interval_s = function, interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._function()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()


class PeakMemory:
    """The largest RssAnon + RssShmem of this process, looked at every 20 ms: file pages are the kernel's to take."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._look()
        self._repeater = Repeater(self._look, 0.02)

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text()
        kib = sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))
        self.peak_bytes = max(self.peak_bytes, kib << 10)

    def stop(self) -> int:
        """The peak in bytes."""
        self._repeater.stop()
        self._look()
        return self.peak_bytes


def drop_pages(directories: Sequence[str]) -> None:
    """Ask the kernel to forget the cached pages of every file in the directories."""
    for directory in directories:
        for entry in os.scandir(directory):
            if entry.is_file():
                file = os.open(entry.path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)


def machine() -> dict:
    """What the record says about the machine."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "instructions": instruction_set(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter for speed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
