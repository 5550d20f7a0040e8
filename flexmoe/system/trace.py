"""Bytes, busy seconds and (on request) spans of every lane; Chrome trace JSON.

A lane works in order, so spans of one lane never overlap. Lanes with several workers are numbered ("disk_read/0").
Host work is stamped with the host clock. Device work is stamped with pairs of timing events, resolved when the
device has passed them, so that measuring adds no synchronisation.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.common import chrome_trace

_MAX_SPANS = 2_000_000
_MOST_INTERVALS = 20_000  # of a lane, where nobody calls `resolve`


@dataclass(slots=True)
class LaneTotals:
    """What a lane has done since the recorder was made.

    Attributes:
        nbytes: bytes moved.
        busy_s: seconds in which at least one of its workers was at work.
        worker_s: seconds of work of its workers, added up.
    """

    nbytes: int = 0
    busy_s: float = 0.0
    worker_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Achieved rate while busy; 0 for a lane that moved nothing."""
        return self.nbytes / self.busy_s if self.busy_s > 0 else 0.0


class Covered:
    """What intervals cover together, whatever order they come in; what is long past can be forgotten."""

    def __init__(self) -> None:
        # Of disjoint intervals in order; those before `_from_s` have been forgotten.
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._from_s = self._swept_s = -math.inf

    def add(self, start_s: float, end_s: float) -> float:
        """One more; returns the seconds of it that no other one has covered."""
        start_s = max(start_s, self._from_s)
        if end_s <= start_s:
            return 0.0
        first, stop = bisect_left(self._ends, start_s), bisect_right(self._starts, end_s)
        before_s = sum(b - a for a, b in zip(self._starts[first:stop], self._ends[first:stop]))
        if first < stop:
            start_s, end_s = min(start_s, self._starts[first]), max(end_s, self._ends[stop - 1])
        self._starts[first:stop], self._ends[first:stop] = [start_s], [end_s]
        if len(self._starts) > _MOST_INTERVALS:
            self.forget(self._ends[_MOST_INTERVALS // 2])
        return end_s - start_s - before_s

    def end_sweep(self) -> None:
        """Forget what had ended when the sweep before this one did."""
        self.forget(self._swept_s)
        if self._ends:
            self._swept_s = self._ends[-1]

    def forget(self, until_s: float) -> None:
        """Intervals that end by then; of later ones only what is after that counts."""
        if until_s <= self._from_s:
            return
        gone = bisect_right(self._ends, until_s)
        del self._starts[:gone], self._ends[:gone]
        self._from_s = until_s


class Recorder:
    """Collects what the lanes do. Safe to call from every thread.

    Args:
        keep_spans: also keep each span, for `write_chrome_trace`.
    """

    def __init__(self, keep_spans: bool = False):
        self.origin_s = time.perf_counter()
        self._keep_spans = keep_spans
        self._spans: list[tuple[str, str, float, float, int]] = []
        self._totals: dict[str, LaneTotals] = {}
        self._pending: list[tuple[str, str, Any, float, Any, Any, int]] = []
        self._covered: dict[str, Covered] = {}
        self._lock = threading.Lock()

    def add(self, lane: str, name: str, start_s: float, end_s: float, nbytes: int = 0) -> None:
        """Record one span; times are `time.perf_counter()` seconds."""
        with self._lock:
            totals = self._totals.setdefault(lane, LaneTotals())
            totals.nbytes += nbytes
            totals.worker_s += end_s - start_s
            totals.busy_s += self._covered.setdefault(lane.split("/")[0], Covered()).add(start_s, end_s)
            if self._keep_spans and len(self._spans) < _MAX_SPANS:
                self._spans.append((lane, name, start_s, end_s, nbytes))

    @contextlib.contextmanager
    def span(self, lane: str, name: str, nbytes: int = 0) -> Iterator[None]:
        """Record the body as host work of a lane."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, start, time.perf_counter(), nbytes)

    def add_device(self, lane: str, name: str, base: Any, base_s: float, start: Any, end: Any, nbytes: int = 0) -> None:
        """Record device work between two timing events; ``base`` is an event stamped at host time ``base_s``."""
        with self._lock:
            self._pending.append((lane, name, base, base_s, start, end, nbytes))

    def resolve(self) -> None:
        """Turn the device spans whose events have passed into ordinary ones. Does not wait for the device.

        It is called once a sweep: a span that began more than two sweeps ago adds busy seconds of the last two alone.
        """
        with self._lock:
            pending, self._pending = self._pending, []
        waiting = []
        for item in pending:
            lane, name, base, base_s, start, end, nbytes = item
            if not end.query():
                waiting.append(item)
                continue
            begin_s = base_s + base.elapsed_time(start) / 1e3
            self.add(lane, name, begin_s, base_s + base.elapsed_time(end) / 1e3, nbytes)
        with self._lock:
            self._pending = waiting + self._pending
            for covered in self._covered.values():
                covered.end_sweep()

    def totals(self, *, by_worker: bool = False) -> dict[str, LaneTotals]:
        """Totals per lane; workers of a lane are added up unless ``by_worker``."""
        result: dict[str, LaneTotals] = {}
        with self._lock:
            for lane, t in self._totals.items():
                entry = result.setdefault(lane if by_worker else lane.split("/")[0], LaneTotals())
                entry.nbytes += t.nbytes
                entry.busy_s += t.busy_s
                entry.worker_s += t.worker_s
        return result

    def reset_totals(self) -> None:
        """Count bytes and busy seconds from zero again; spans are kept."""
        with self._lock:
            self._totals.clear()

    def write_chrome_trace(self, path: str | Path, *, since_s: float = 0.0) -> None:
        """Write the spans as Chrome trace JSON (chrome://tracing, Perfetto): one track per lane, microseconds.

        Args:
            since_s: leave out what began before this time of `time.perf_counter()`.

        Raises:
            StorageError: the directory is missing, read-only or full.
        """
        with self._lock:
            spans = [span for span in self._spans if span[2] >= since_s]
        chrome_trace.write_chrome_trace(path, spans, origin_s=self.origin_s)
