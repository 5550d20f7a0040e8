"""Splits a file into lines without ever holding one that is too long, and with every byte going through one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from policies.common import file_io

_CHUNK_BYTES = 1 << 20


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
