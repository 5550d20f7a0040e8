"""The reads of an engine between its sweeps: those ahead go on after a sweep has ended."""

from __future__ import annotations

import time

from flexmoe import LLM

_QUIET_S = 0.03  # without a finished read: none is under way


def read_when_quiet(llm: LLM) -> int:
    """Wait until no more bytes come; returns those that were read so far."""
    read = -1
    while read != (read := bytes_read(llm)):
        time.sleep(_QUIET_S)
    return read


def bytes_read(llm: LLM) -> int:
    """Bytes that the engine has read so far."""
    totals = llm.engine.recorder.totals()
    return totals["disk_read"].nbytes if "disk_read" in totals else 0
