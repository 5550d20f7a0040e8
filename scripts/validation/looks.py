"""Short looks at the machine between the sweeps of a run: a shared one changes its speed by half within seconds.

What is measured seconds apart from a run says little about it there. The looks share the run out: each stretch of sweeps was
computed, and read, at the speeds seen before and after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from pathlib import Path

import torch

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from flexmoe.probing.copies import memory_rate
from flexmoe.probing.disk import random_buffers, transfer
from flexmoe.probing.effort import Effort, Heads
from flexmoe.probing.gemms import Seconds, bench_arch, expert_bench
from flexmoe.probing.timing import WeightArena, noise
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DirectFile

#: Of units that are read, so many under way.
UNIT_BYTES, _UNITS = 32 << 20, 8
_DISK_S, _CORES_S, _MEMORY_BYTES = 0.2, 0.1, 256 << 20
#: Tokens of the products that are timed: bound by the memory, between, and by the cores.
TOKENS = (2, 32, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The machine at one time.

    Args:
        disk: bytes/s of reads that bypass the page cache.
        memory: of reads of memory, relative to the probe's; 1 where a GPU computes.
        cores: of products of experts of `TOKENS`, relative to the probe's; empty where a GPU computes.
    """

    disk: float
    memory: float
    cores: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Sweeps between two looks, and the seconds that they took."""

    before: Look
    after: Look
    wall_s: float


def mean_look(stretches: Sequence[Stretch]) -> Look:
    """The machine of a whole run: rates by the time in which they held."""
    weights = [each.wall_s / 2 for each in stretches for _ in range(2)]
    looks = [(look.disk, look.memory, *look.cores) for each in stretches for look in (each.before, each.after)]
    disk, memory, *cores = (sum(map(mul, weights, rates)) / sum(weights) for rates in zip(*looks, strict=True))
    return Look(disk=disk, memory=memory, cores=tuple(cores))


class Looks:
    """Takes looks, by the runtime's own reads and products.

    Args:
        device: as the run's.
        hardware: what the probe found.
        files: what is read.
        seconds: of a product of experts, as `expert_bench` times it; None where a GPU computes.
        elements: of the expert in it.
    """

    def __init__(
        self,
        device: Device,
        hardware: Hardware,
        files: Sequence[Path],
        seconds: Seconds | None,
        elements: int,
    ) -> None:
        self._buffers, self._files = random_buffers(device, UNIT_BYTES, _UNITS), files
        self._device, self._gpu, self._seconds, self._elements = device, hardware.gpu, seconds, elements
        self._values = None if seconds is None else noise(device, torch.float32, _MEMORY_BYTES // 4)

    def look(self) -> Look:
        """Takes about half a second."""
        if self._seconds is None or self._values is None:
            return Look(disk=self._disk(), memory=1.0, cores=())
        memory = memory_rate(self._device, self._values, _CORES_S) / self._gpu.memory_bytes_per_s
        return Look(disk=self._disk(), memory=memory, cores=self._cores(self._seconds))

    def _disk(self) -> float:
        nbytes = seconds = 0.0
        for path in self._files:
            with contextlib.closing(DirectFile(path)) as file:
                whole = path.stat().st_size // UNIT_BYTES * UNIT_BYTES
                done = transfer("disk_read", file, self._buffers, whole, _DISK_S - seconds)
            nbytes, seconds = nbytes + done.nbytes, seconds + done.seconds
            if seconds >= _DISK_S:
                break
        return nbytes / seconds

    def _cores(self, seconds: Seconds) -> tuple[float, ...]:
        curve = self._gpu.experts[torch.bfloat16.itemsize]
        return tuple(curve.seconds(n, self._elements) / seconds(n, _CORES_S, 1, 2) for n in TOKENS)


@contextlib.contextmanager
def looks_at(device: Device, hardware: Hardware, arch: ModelArch, files: Sequence[Path]) -> Iterator[Looks]:
    """Looks beside runs of a model, whose files are read."""
    if device.is_cuda:
        yield Looks(device, hardware, files, None, arch.expert_params)
        return
    effort = Effort()
    expert = bench_arch(Heads(hidden=arch.hidden, heads=1, kv_heads=1, head_dim=2), arch.ffn)
    arena = WeightArena(device, torch.bfloat16, effort.cycle_bytes)
    with expert_bench(device, expert, torch.bfloat16, arena, TOKENS[-1], effort) as seconds:
        yield Looks(device, hardware, files, seconds, expert.expert_params)
