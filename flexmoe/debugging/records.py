"""The files of debug mode: JSON lines, one file for each kind of record, written sweep by sweep.

``docs/debugging.md`` describes the fields. Any program reads them; nothing of torch is needed.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from flexmoe.debugging.ranges import Range
from flexmoe.system.trace import Recorder
from policies.common.chrome_trace import Span
from policies.common.file_io import storage_errors
from policies.common.json_files import write_json

#: Names of the files that have a line for each record.
STEPS, RANGES, EXPERTS, OPERATIONS = "steps.jsonl", "ranges.jsonl", "experts.jsonl", "operations.jsonl"
#: The file that says what was run.
RUN = "run.json"
#: Layer, unit, expert and tensor.
RangeKey = tuple[int, str, int | None, str]


class SpanRecorder(Recorder):
    """A recorder that gives what it has recorded span by span, too."""

    def __init__(self, keep_spans: bool = False):
        super().__init__(keep_spans)
        self._new: list[Span] = []

    def add(self, lane: str, name: str, start_s: float, end_s: float, nbytes: int = 0) -> None:
        """Record one span, from any thread."""
        super().add(lane, name, start_s, end_s, nbytes)
        self._new.append((lane, name, start_s, end_s, nbytes))

    def take_new(self) -> list[Span]:
        """Spans recorded since the last call."""
        count = len(self._new)  # others may add more meanwhile
        new = self._new[:count]
        del self._new[:count]
        return new


class DebugRecords:
    """Writes the files; those of an earlier start in the directory are replaced.

    Args:
        directory: created where it is missing.
        run: what was run, for `RUN`.
        recorder: of the lanes.

    Raises:
        StorageError: the directory cannot be written.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any], recorder: SpanRecorder):
        self._directory, self._recorder = directory, recorder
        self._starts_s: list[float] = []
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / RUN, run, "what debug mode says of the run")
            self._files: dict[str, TextIO] = {
                name: (directory / name).open("w", encoding="utf-8") for name in (STEPS, RANGES, EXPERTS, OPERATIONS)
            }

    def begin(self, start_s: float) -> None:
        """A sweep begins at this time of `time.perf_counter()`."""
        self._starts_s.append(start_s)

    def experts(self, sweep: int, layer: int, first_token: int, ids_TK: np.ndarray) -> None:
        """The experts ``[T, K]`` that a layer has chosen for tokens of the block from the first one on."""
        record = {"sweep": sweep, "layer": layer, "first_token": first_token, "experts": ids_TK.tolist()}
        self._write(EXPERTS, [record])

    def end(self, step: Mapping[str, Any], ranges: Mapping[RangeKey, Range]) -> None:
        """A sweep is over.

        Args:
            step: its line, which has its number as ``sweep``.
            ranges: of the tensors that it has computed.
        """
        self._write(STEPS, [step])
        self._write(
            RANGES,
            (
                {"sweep": step["sweep"], "layer": layer, "unit": unit, "expert": expert, "tensor": tensor}
                | found.record()
                for (layer, unit, expert, tensor), found in ranges.items()
            ),
        )
        self._write_operations()
        with storage_errors(self._directory):
            for file in self._files.values():
                file.flush()

    def relative_s(self, time_s: float) -> float:
        """Seconds since the run was begun of a time of `time.perf_counter()`."""
        return time_s - self._recorder.origin_s

    def close(self) -> None:
        """Write what has been recorded since the last sweep, and close the files."""
        self._write_operations()
        with storage_errors(self._directory):
            for file in self._files.values():
                file.close()

    def _write_operations(self) -> None:
        self._write(
            OPERATIONS,
            (
                {
                    "sweep": self._sweep_at(start_s),
                    "lane": lane,
                    "operation": name,
                    "start_s": self.relative_s(start_s),
                    "seconds": end_s - start_s,
                    "bytes": nbytes,
                }
                for lane, name, start_s, end_s, nbytes in self._recorder.take_new()
            ),
        )

    def _sweep_at(self, time_s: float) -> int | None:
        """The sweep that ran then; None: the weights were being loaded."""
        begun = bisect_right(self._starts_s, time_s)
        return begun - 1 if begun else None

    def _write(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        with storage_errors(self._directory / name):
            self._files[name].writelines(json.dumps(record) + "\n" for record in records)
