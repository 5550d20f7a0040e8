"""Keeps a process within its memory while it runs: it gives back what it can, and then has fewer rows in flight."""

from __future__ import annotations

import logging
from typing import Protocol

from flexmoe.system.device import give_back_freed_memory
from flexmoe.system.memory import is_short, resident_bytes
from policies.common.memory_units import in_units

log = logging.getLogger(__name__)
#: How torch says that the host has no memory for a tensor; it is a RuntimeError without a class of its own.
_REFUSED = "can't allocate memory"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the host has no memory for an allocation."""
    return isinstance(error, MemoryError) or _REFUSED in str(error)


class GiveBack(Protocol):
    """Gives memory back that is held and not needed."""

    def __call__(self) -> None: ...


class Shrink(Protocol):
    """Has fewer rows in flight; returns how many, or None where no fewer are possible.

    With ``restart`` the rows that stay in flight begin anew as well.
    """

    def __call__(self, *, restart: bool = False) -> int | None: ...


class MemoryWatch:
    """Looks at the memory of the process between sweeps, and at errors within them.

    Args:
        limit_bytes: what the process may hold.
        give_back, shrink: how it comes to hold less.
    """

    def __init__(self, limit_bytes: int, give_back: GiveBack, shrink: Shrink) -> None:
        self._limit_bytes, self._give_back, self._shrink = limit_bytes, give_back, shrink
        self._warned = False

    def check(self) -> None:
        """Called between two sweeps: where memory is short, hold less."""
        if not is_short(self._limit_bytes):
            return
        self._release()
        if is_short(self._limit_bytes):
            held = f"the process holds {in_units(resident_bytes())} of the {in_units(self._limit_bytes)} that it may"
            if self._shrunk(held, restart=False):
                self._release()

    def recovers(self, error: BaseException) -> bool:
        """After a sweep that lacked host memory (`lacks_memory`): whether fewer rows will now be tried."""
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        recovers = self._shrunk(why, restart=True)
        self._release()
        return recovers

    def _release(self) -> None:
        self._give_back()
        give_back_freed_memory()

    def _shrunk(self, why: str, *, restart: bool) -> bool:
        rows = self._shrink(restart=restart)
        if rows is not None:
            tell = log.info if self._warned else log.warning
            tell("memory runs short: %s; from now on at most %d rows are in flight, and the run continues", why, rows)
            self._warned = True
        return rows is not None
