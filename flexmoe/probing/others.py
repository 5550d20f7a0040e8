"""What else runs on the machine while it is measured."""

from __future__ import annotations

import logging
import time

from flexmoe.system.machine import busy_core_s, usable_cores

log = logging.getLogger(__name__)

#: Other processes may use so much of the cores without a word.
_IDLE = 0.1


class Others:
    """How busy other processes keep the cores from now on: rates that were measured beside them are too low."""

    def __init__(self) -> None:
        self._before = self._now()

    def sentence(self) -> str:
        """What to say of it, also as a warning; empty when the machine was idle or it cannot be told."""
        before, now = self._before, self._now()
        if before is None or now is None:
            return ""
        used = (now[0] - before[0]) / max(1e-3, now[1] - before[1])
        if used < _IDLE * usable_cores():
            return ""
        sentence = f"other processes kept {used:.1f} of {usable_cores()} cores busy meanwhile"
        log.warning("%s: measure again on an idle machine for better numbers", sentence)
        return f"; {sentence}"

    def _now(self) -> tuple[float, float] | None:
        busy_s = busy_core_s()
        return None if busy_s is None else (busy_s - time.process_time(), time.perf_counter())
