"""Where finished lines wait between the end of their row and the end of the job.

Rows finish in any order and the output is in input order. A job's lines may be larger than memory, so a file has them.
"""

from __future__ import annotations

import contextlib
import tempfile
from array import array
from pathlib import Path
from typing import IO

from flexmoe.output_files import storage_errors


class Spool:
    """Finished lines in the order in which they came, in an unnamed file; in memory, their places.

    Args:
        rows: number of rows of the job.
        directory: where the file lives; the output's, so that a full disk is noticed while rows finish.
    """

    def __init__(self, rows: int, directory: Path) -> None:
        self._directory = directory
        self._offsets, self._lengths = array("q", [-1]) * rows, array("q", [0]) * rows
        self._failed = bytearray(rows)
        self._end = 0
        self.rows_done = self.rows_failed = 0
        with storage_errors(directory):
            self._file = tempfile.TemporaryFile(dir=directory, prefix=".flexmoe-")

    def put(self, row: int, line: bytes, *, failed: bool) -> None:
        """Keeps the line of `row`; a row has one."""
        if row in self:
            raise ValueError(f"row {row} is already finished")
        with storage_errors(self._directory):
            self._file.write(line)
        self._offsets[row], self._lengths[row], self._failed[row] = self._end, len(line), failed
        self._end += len(line)
        self.rows_done += 1
        self.rows_failed += failed

    def __contains__(self, row: int) -> bool:
        return self._offsets[row] >= 0

    def copy(self, file: IO[bytes], *, failed: bool) -> None:
        """Writes the lines of the failed (or of the other) rows to `file`, in input order."""
        self._file.flush()
        for row, offset in enumerate(self._offsets):
            if offset >= 0 and self._failed[row] == failed:
                self._file.seek(offset)
                file.write(self._file.read(self._lengths[row]))

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        # What is still buffered is not wanted any more, and on a full disk it cannot be flushed.
        with contextlib.suppress(OSError):
            self._file.close()
