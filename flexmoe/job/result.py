"""What a finished job did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a finished job did. Tokens are those of the rows that went to the output file.

    Args:
        rows_ok, rows_failed: rows in the output file and in the error file.
        rows_resumed: rows that an earlier start had finished already.
        output_path, error_path: the files, links followed; ``error_path`` is None where no row failed.
        wall_s: seconds from the first read of the input to the output under its final name; 0 where it was there.
        was_finished: nothing was left to do.
        note: what the user may not expect of the answers: rows that name another model.
        metrics: what this start has measured, by the names of ``--metrics-json``; empty where nobody measured.
    """

    rows_ok: int
    rows_failed: int
    rows_resumed: int
    prompt_tokens: int
    generated_tokens: int
    output_path: Path
    error_path: Path | None
    wall_s: float
    was_finished: bool = False
    note: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
