"""The lines of a file: split without ever holding one that is too long, with every byte going through one function, and made
into requests, in this process or in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flexmoe.inputs.parsers import Parser
from flexmoe.openai.batch_line import Request
from flexmoe.openai.fields import RowError
from flexmoe.openai.json_line import InvalidLine, show, too_long
from policies.common import file_io
from policies.common.reading import without_bom

_CHUNK_BYTES = 1 << 20
#: The code of a row whose structural fault was recorded.
INVALID_LINE = "invalid_line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a file.

    Args:
        offset, length: its place in bytes, the line end included.
        data: its bytes without the line end; None when it is longer than the limit.
    """

    offset: int
    length: int
    data: bytes | None


def lines(descriptor: int, limit_bytes: int, on_chunk: Callable[[bytes], None]) -> Iterator[Line]:
    """The lines of an open file, in order; the last one may lack its line end.

    Args:
        limit_bytes: of a line's data.
        on_chunk: gets every byte of the file, in order.
    """
    parts: list[bytes] = []
    offset = size = position = 0  # where the line begins, how much of it was seen, and how much of the file
    while chunk := file_io.read_at(descriptor, _CHUNK_BYTES, position):
        on_chunk(chunk)
        position += len(chunk)
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            size += len(piece)
            data = b"".join((*parts, piece)) if size <= limit_bytes else None
            yield Line(offset=offset, length=size + 1, data=data)
            offset, size, parts = offset + size + 1, 0, []
        size += len(rest)
        parts = [*parts, rest] if size <= limit_bytes else []
    if size:
        yield Line(offset=offset, length=size, data=b"".join(parts) if size <= limit_bytes else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """What it takes to parse a row.

    Args:
        number: 1-based place in the file.
        data: its bytes without the line end; None when it is too long.
        recorded: a structural fault becomes an error row.
        name: its id where that cannot be its own.
        repeats: number of the earlier line that has its id.
    """

    number: int
    data: bytes | None
    recorded: bool = False
    name: str | None = None
    repeats: int | None = None

    def parse(self, parser: Parser) -> Request | None:
        """The request; None for a blank line. An id that cannot be read and has no `name` is "".

        Raises:
            InvalidLine: it cannot be understood, and that is not to be recorded.
        """
        try:
            return self._parse(parser)
        except InvalidLine as error:
            if not self.recorded:
                raise error.at(f"{parser.unit} {self.number}") from None
            return Request(
                custom_id=self.name or error.custom_id or "",
                line_number=self.number,
                kind="completion",
                error=RowError(code=INVALID_LINE, message=str(error), param=error.param),
            )

    def packed(self) -> list[Any]:
        """Itself as JSON values."""
        data = None if self.data is None else self.data.decode("utf-8", "surrogateescape")
        return [self.number, data, self.recorded, self.name, self.repeats]

    @classmethod
    def unpacked(cls, values: list[Any]) -> RawRow:
        """The inverse of `packed`."""
        number, data, recorded, name, repeats = values
        raw = None if data is None else data.encode("utf-8", "surrogateescape")
        return cls(number=number, data=raw, recorded=recorded, name=name, repeats=repeats)

    def _parse(self, parser: Parser) -> Request | None:
        if self.data is None:
            raise too_long()
        data = without_bom(self.data)  # of any line: files that were joined have it in the middle
        if not data.strip():
            return None
        request = parser.parse(data, self.number)
        if self.repeats is not None:
            message = f"custom_id {show(request.custom_id)} is already the id of {parser.unit} {self.repeats}"
            raise InvalidLine(f"{message}; make every custom_id unique", param="custom_id")
        return request
