"""A whole file of requests: every row checked when it is opened, and read again one by one as they are wanted.

A job may have millions of rows and need the last of them hours later, so memory keeps where a row is, not what it says.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from flexmoe.errors import DataError, InputMissingError, StorageError
from flexmoe.inputs.custom_ids import CustomIds
from flexmoe.inputs.lines import INVALID_LINE, Line, RawRow, lines
from flexmoe.inputs.parsers import JsonLines, Parser
from flexmoe.openai.batch_line import Request
from flexmoe.openai.json_line import MAX_LINE_BYTES, InvalidLine
from policies.common import file_io
from policies.common.option_names import option

OnInvalid = Literal["fail", "record"]

#: Faults that are listed at once; a file with more is probably no requests file at all.
MOST_FAULTS_LISTED = 10
#: One job asks for one model, as a rule; a file with a name for every row is not worth its memory.
MOST_MODELS_KEPT, MOST_MODEL_CHARACTERS = 20, 1000
_TOO_LONG = -1
_SOUND, _FAULTY, _FAULTY_WITHOUT_ID = range(3)


class RequestFile:
    """A validated file of requests: its rows by number, in the order of the file.

    Use `RequestFile.open`; close it, or use it as a context manager. Rows may be read from several threads.

    Args:
        file: open for reading, and owned from now on.
        name: for messages.
        parser: of its lines.
        on_invalid: whether a structural fault fails the job, or becomes an error row.

    Attributes:
        content_hash: the SHA-256 of the whole file.
        rows_invalid: rows with a structural fault.
        models: the names of models that rows give, each with the number of the first line that does; the first few.

    Raises:
        DataError: a line is structurally at fault, a `custom_id` is used twice, or there is no request.
        StorageError: reading failed.
    """

    def __init__(self, file: IO[bytes], name: str, parser: Parser, on_invalid: OnInvalid = "fail") -> None:
        self.name, self.parser, self.content_hash = name, parser, ""
        self._file, self._recorded = file, on_invalid == "record"
        self._offsets, self._lengths, self._numbers = array("q"), array("q"), array("q")
        self._checksums, self._states = array("I"), bytearray()
        self._ids = CustomIds()
        self.models: dict[str, int] = {}
        self._repeated: dict[int, int] = {}
        try:
            self._identity = self._stat()
            self._scan()
            self._compare_ids()
        except BaseException:
            self.close()
            raise
        self.rows_invalid = sum(map(bool, self._states)) + sum(not self._states[row] for row in self._repeated)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], parser: Parser | None = None, on_invalid: OnInvalid = "fail"
    ) -> RequestFile:
        """Opens `path` and validates every line; JSONL unless there is another parser.

        Raises:
            InputMissingError: there is no such file, or it cannot be read.
            DataError, StorageError: as the class.
        """
        return cls(_open_regular(Path(path)), str(path), parser or JsonLines(), on_invalid)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Request]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Request:
        """Reads one row again.

        Raises:
            IndexError: no such row.
            DataError: the file was changed since it was opened.
            StorageError: reading failed.
        """
        request = self.raw(row).parse(self.parser)
        if request is None:
            raise self._changed()
        return request

    def custom_ids(self) -> Iterator[str]:
        """The ids of all rows, in order; no two are the same."""
        return (request.custom_id for request in self)

    def raw(self, row: int) -> RawRow:
        """A row as it lies in the file, for another process to parse.

        Raises:
            IndexError, DataError, StorageError: as reading it.
        """
        number, first = self._numbers[row], self._repeated.get(row)
        unnamed = first is not None or self._states[row] == _FAULTY_WITHOUT_ID
        return RawRow(
            number=number,
            data=self._data(row),
            recorded=self._recorded,
            name=self._ids.free_name(number) if unnamed else None,
            repeats=None if first is None else self._numbers[first],
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RequestFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scan(self) -> None:
        """Looks at every line once.

        Raises:
            DataError: lines are structurally at fault, or there is no request.
        """
        digest = hashlib.sha256()
        found = lines(self._file.fileno(), MAX_LINE_BYTES, digest.update)
        try:
            self._refuse(self._add(line, number) for number, line in enumerate(found, start=1))
        except OSError as error:
            raise self._unreadable(error) from error
        if not self._offsets:
            raise DataError(f"{self.name} holds no requests; write one {self.parser.unit} for each")
        self.content_hash = digest.hexdigest()

    def _add(self, line: Line, number: int) -> str | None:
        """Keeps the place of a line, if a request is on it; returns what is wrong with it."""
        try:
            request = RawRow(number=number, data=line.data, recorded=self._recorded).parse(self.parser)
        except InvalidLine as error:
            return str(error)
        if request is None:
            return None
        faulty = request.error is not None and request.error.code == INVALID_LINE
        self._states.append((_FAULTY if request.custom_id else _FAULTY_WITHOUT_ID) if faulty else _SOUND)
        self._ids.add(request.custom_id or None)
        if request.model is not None and len(self.models) < MOST_MODELS_KEPT:
            self.models.setdefault(request.model[:MOST_MODEL_CHARACTERS], number)
        self._offsets.append(line.offset)
        self._lengths.append(_TOO_LONG if line.data is None else len(line.data))
        self._numbers.append(number)
        self._checksums.append(zlib.crc32(line.data or b""))
        return None

    def _compare_ids(self) -> None:
        """Finds the rows whose id is that of an earlier one.

        Raises:
            DataError: there are such rows, and faults are not to be recorded.
        """
        self._repeated = self._ids.repeated(lambda row: self[row].custom_id)
        if not self._recorded:
            self._refuse(map(self._fault, self._repeated))

    def _fault(self, row: int) -> str | None:
        try:
            self.raw(row).parse(self.parser)
        except InvalidLine as error:
            return str(error)
        return None

    def _refuse(self, faults: Iterable[str | None]) -> None:
        """Goes through all faults, None for none, and fails the job with the first of them."""
        listed: list[str] = []
        for fault in faults:
            listed += [f"{self.name}: {fault}"] if fault is not None else []
            if len(listed) == MOST_FAULTS_LISTED:
                listed.append("and perhaps more")
                break
        if listed:
            hint = f"({option('on_invalid', 'record')} makes error rows of them)"
            raise DataError("\n".join((*listed, hint)))

    def _data(self, row: int) -> bytes | None:
        """The bytes of a row; None when it is too long.

        Raises:
            DataError: they are not what they were.
            StorageError: reading failed.
        """
        length, descriptor = self._lengths[row], self._file.fileno()
        try:
            if self._stat() != self._identity:
                raise self._changed()
            data = file_io.read_at(descriptor, max(length, 0), self._offsets[row])
        except OSError as error:
            raise self._unreadable(error) from error
        if zlib.crc32(data) != self._checksums[row]:
            raise self._changed()
        return None if length == _TOO_LONG else data

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _changed(self) -> DataError:
        return DataError(f"{self.name} was changed while the job was running; start the job again")

    def _unreadable(self, error: OSError) -> StorageError:
        return StorageError(f"reading {self.name} failed: {error.strerror or error}")


def _open_regular(path: Path) -> IO[bytes]:
    """Opens a regular file.

    Raises:
        InputMissingError: there is none, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputMissingError(f"{path} is no regular file; save the requests to a file first")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissingError(f"the input file {path} does not exist; check its name") from None
    except OSError as error:
        raise InputMissingError(f"the input file {path} cannot be read: {error.strerror}") from None


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
