"""Spans of lanes as Chrome trace JSON (chrome://tracing, Perfetto). What ran and what is predicted are written alike."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from policies.common import file_io
from policies.common.errors import StorageError

#: (lane, name, start and end in seconds, bytes moved or 0).
Span = tuple[str, str, float, float, int]


def write_chrome_trace(path: str | os.PathLike, spans: Iterable[Span], *, origin_s: float = 0.0) -> None:
    """Write one track per lane, in microseconds; under its final name in one step.

    Args:
        spans: what the lanes did, in any order.
        origin_s: the time that becomes 0.

    Raises:
        StorageError: the directory is missing, read-only or full.
    """
    ordered = sorted(spans, key=lambda span: (span[0], span[2]))
    lanes = sorted({span[0] for span in ordered})
    track = {lane: place + 1 for place, lane in enumerate(lanes)}
    events: list[dict] = [
        {"ph": "M", "pid": 1, "tid": track[lane], "name": "thread_name", "args": {"name": lane}} for lane in lanes
    ]
    for lane, name, start, end, nbytes in ordered:
        ts = (start - origin_s) * 1e6
        span = {"ph": "X", "pid": 1, "tid": track[lane], "name": name, "ts": ts, "dur": (end - start) * 1e6}
        events.append({**span, "args": {"bytes": nbytes}} if nbytes else span)
    try:
        file_io.write_file(path, [json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()])
    except OSError as error:
        raise StorageError(f"the trace could not be written to {path}: {error.strerror}.") from error
