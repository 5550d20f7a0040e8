"""The rows of a job in their file: all of it, or every n-th row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.inputs.raw_row import RawRow
from flexmoe.inputs.request_file import RequestFile
from flexmoe.openai.batch_line import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A job's rows, numbered from 0.

    Args:
        requests: the file.
        numbers: the number in the file of each row of the job.
    """

    requests: RequestFile
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> Request:
        """Reads a row again; errors are those of `RequestFile`."""
        return self.requests[self.numbers[row]]

    def raw(self, row: int) -> RawRow:
        """A row as it lies in the file."""
        return self.requests.raw(self.numbers[row])
