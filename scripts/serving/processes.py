"""What other processes take of the processor and of memory, as Linux tells it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from statistics import fmean

_LOOK_S = 0.25


def children(process: int) -> list[int]:
    """The processes that it has started."""
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()]


def cpu_s(process: int) -> float:
    """Seconds of the processor, in user and kernel."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def held_bytes(process: int) -> int:
    """Resident memory."""
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Notes the memory of processes, together, as long as it is entered.

    Args:
        processes: their ids.
    """

    def __init__(self, *processes: int) -> None:
        self._processes = processes
        self._held: list[int] = []
        self.note()

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def note(self) -> None:
        """Notes it now."""
        self._held.append(sum(map(held_bytes, self._processes)))

    def held_mb(self) -> dict[str, float]:
        """Before, after, at most, and the means of both halves."""
        half = len(self._held) // 2
        found = {"before": self._held[0], "most": max(self._held), "after": self._held[-1]}
        halves = {"first_half": fmean(self._held[:half]), "second_half": fmean(self._held[half:])}
        return {name: held / 1e6 for name, held in (found | halves).items()}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self.note()
