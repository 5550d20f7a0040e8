"""A whole requests file: every line checked when it is opened, and its rows read again one by one as they are wanted.

A job may have millions of rows and need the last of them hours later, so memory keeps where a row is, not what it says.
"""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path

from flexmoe.errors import DataError, InputMissingError, StorageError
from flexmoe.requests import MAX_LINE_BYTES, Request, parse_line, show


class RequestFile:
    """A validated requests file: its rows by number, in the order of the file.

    Use `RequestFile.open`; close it, or use it as a context manager. `content_hash` is the SHA-256 of the whole file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content_hash = ""
        self._offsets, self._lengths, self._line_numbers = array("q"), array("q"), array("q")
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputMissingError(f"{path} is no regular file; save the requests to a file first")
            self._file = open(path, "rb")
        except (FileNotFoundError, NotADirectoryError):
            raise InputMissingError(f"the input file {path} does not exist; check --input-file") from None
        except OSError as error:
            raise InputMissingError(f"the input file {path} cannot be read: {error.strerror}") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RequestFile:
        """Opens `path` and validates every line.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError: a line is malformed, a `custom_id` is used twice, or there is no request.
            StorageError: reading failed.
        """
        requests = cls(Path(path))
        try:
            requests._scan()
        except BaseException:
            requests.close()
            raise
        return requests

    def _scan(self) -> None:
        self._identity = self._stat()
        digest = hashlib.sha256()
        seen: dict[str, int] = {}
        offset, line_number = 0, 0
        while line := self._read(MAX_LINE_BYTES + 1):
            line_number += 1
            digest.update(line)
            request = self._parse(line, line_number)
            if request is not None:
                first = seen.setdefault(request.custom_id, line_number)
                if first != line_number:
                    raise DataError(
                        f"{self.path}: line {line_number}: custom_id {show(request.custom_id)} is already the id of "
                        f"line {first}; make every custom_id unique"
                    )
                self._offsets.append(offset)
                self._lengths.append(len(line))
                self._line_numbers.append(line_number)
            offset += len(line)
        if not self._offsets:
            raise DataError(f"{self.path} holds no requests; write one JSON object per line")
        self.content_hash = digest.hexdigest()

    def _parse(self, line: bytes, line_number: int) -> Request | None:
        try:
            return parse_line(line, line_number)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def _read(self, limit: int) -> bytes:
        try:
            return self._file.readline(limit)
        except OSError as error:
            raise StorageError(f"reading {self.path} failed: {error.strerror}") from error

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Request]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Request:
        """Reads one row again.

        Raises:
            IndexError: no such row.
            DataError: the file was changed since it was opened.
        """
        offset, length, line_number = self._offsets[row], self._lengths[row], self._line_numbers[row]
        if self._stat() != self._identity:
            raise DataError(f"{self.path} was changed while the job was running; start the job again")
        self._file.seek(offset)
        request = self._parse(self._read(length), line_number)
        if request is None:
            raise DataError(f"{self.path} was changed while the job was running; start the job again")
        return request

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RequestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
