"""Time that the hypervisor gave to other machines: what is measured meanwhile says nothing about this one."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from flexmoe.probing.effort import Effort
from flexmoe.probing.latency import Reading, compute, read_file
from flexmoe.system.device import Device

#: The most of the cores' time that may be stolen from a run that counts, beside what its own reads cost.
MOST = 0.03


class Stolen:
    """The share of the cores' time since this was made that a virtual machine wanted and did not get.

    Args:
        stat: the kernel's counters, proc(5).
    """

    def __init__(self, stat: Path = Path("/proc/stat")):
        self._stat, self._before = stat, _jiffies(stat)

    def share(self) -> float:
        """0 to 1; 0 on a machine of its own."""
        stolen, total = (now - then for now, then in zip(_jiffies(self._stat), self._before, strict=True))
        return stolen / total if total else 0.0


def wait_for_calm(at_most_s: float, look_s: float = 1.0) -> float:
    """Wait until little is stolen from products that keep all cores busy; returns the seconds waited."""
    begin, x = time.perf_counter(), torch.ones(1024, 1024)
    while time.perf_counter() - begin < at_most_s:
        stolen, look_began = Stolen(), time.perf_counter()
        while time.perf_counter() - look_began < look_s:
            torch.mm(x, x)
        if stolen.share() <= MOST:
            break
        time.sleep(look_s)
    return time.perf_counter() - begin


def stolen_by_reads(directory: Path, seconds: float = 1.0) -> float:
    """The share of the cores' time that is stolen while this machine reads and computes with all it has.

    The host of a virtual machine serves its disk on cores that the machine's own work wants too: that is no disturbance.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(read_file(Device("cpu"), directory, Effort()))
        stack.enter_context(contextlib.closing(Reading(*file)))
        stolen = Stolen()
        compute(seconds)
        return stolen.share()


def most_stolen(by_reads: float, read_s: float, wall_s: float) -> float:
    """The most that may be stolen from a run that counts.

    Args:
        by_reads: from `stolen_by_reads`.
        read_s, wall_s: seconds in which the run read from disk, of all of it.
    """
    return MOST + by_reads * min(1.0, read_s / wall_s)


def _jiffies(stat: Path) -> tuple[int, int]:
    """Stolen and all time of all cores."""
    fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return fields[7], sum(fields)
