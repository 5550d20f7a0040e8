"""Time that the hypervisor gave to other machines: what is measured meanwhile says nothing about this one."""

from __future__ import annotations

import time
from pathlib import Path

import torch

#: The most of the cores' time that may be stolen from a run that counts.
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


def _jiffies(stat: Path) -> tuple[int, int]:
    """Stolen and all time of all cores."""
    fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return fields[7], sum(fields)
