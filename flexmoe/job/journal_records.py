"""What a journal consists of: records that say of themselves where they end and whether they are whole.

A record is a head of 28 bytes and its payload. The head holds a mark, the kind, a row, the length of the payload, the
CRC-32 of the payload and the CRC-32 of the head itself, little-endian. All numbers of a payload are little-endian too.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from dataclasses import dataclass, field
from typing import Literal

from flexmoe.errors import DataError
from flexmoe.outputs import TokenLogprob
from flexmoe.params import Resumed

Kind = Literal[0, 1, 2, 3, 4]
#: The first record: which job this is the journal of.
OPENING: Kind = 0
#: A finished row: its counts of tokens and its output line.
DONE: Kind = 1
#: A row that failed: its error line.
FAILED: Kind = 2
#: What a sample in flight has generated since its last such record.
TOKENS: Kind = 3
#: All before this record is on the disk; its row is its own place in the file.
SYNCED: Kind = 4

MARK = b"FMJ\x01"
_FIELDS = struct.Struct("<4sBxxxQII")
_CRC = struct.Struct("<I")
HEAD_BYTES = _FIELDS.size + _CRC.size
_COUNTS = struct.Struct("<II")
_TOKENS = struct.Struct("<IIII?")
_LOGPROB = struct.Struct("<dB")
_TOP = struct.Struct("<Id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The head of a record whose CRC is right."""

    kind: int
    row: int
    length: int
    crc: int

    @classmethod
    def decode(cls, data: bytes) -> Head | None:
        """The head at the beginning of `data`; None when it is cut or damaged."""
        if len(data) < HEAD_BYTES:
            return None
        mark, kind, row, length, crc = _FIELDS.unpack_from(data)
        if mark != MARK or _CRC.unpack_from(data, _FIELDS.size) != (zlib.crc32(data[: _FIELDS.size]),):
            return None
        return cls(kind=kind, row=row, length=length, crc=crc)


def encode(kind: Kind, row: int, payload: bytes) -> bytes:
    """A whole record."""
    fields = _FIELDS.pack(MARK, kind, row, len(payload), zlib.crc32(payload))
    return b"".join((fields, _CRC.pack(zlib.crc32(fields)), payload))


def decode(data: bytes, at: int = 0) -> bytes | None:
    """The payload of the record at a byte of `data`; None where there is no whole and undamaged one."""
    head = Head.decode(data[at : at + HEAD_BYTES])
    if head is None:
        return None
    payload = data[at + HEAD_BYTES : at + HEAD_BYTES + head.length]
    return payload if len(payload) == head.length and zlib.crc32(payload) == head.crc else None


def encode_line(line: bytes, prompt_tokens: int, generated_tokens: int) -> bytes:
    """The payload of a finished or failed row."""
    return _COUNTS.pack(prompt_tokens, generated_tokens) + line


def decode_line(payload: bytes) -> bytes:
    """The line in the payload of a finished or failed row."""
    return payload[_COUNTS.size :]


def decode_counts(payload: bytes) -> tuple[int, int]:
    """Prompt tokens and generated tokens of a finished row, from the beginning of its payload."""
    return _COUNTS.unpack_from(payload)


@dataclass(slots=True, kw_only=True)
class Generated:
    """What one sample of a row has generated: the ids, and their log-probabilities where the row asks for them.

    Args:
        prompt, sample: which prompt of the row, and which completion of that prompt.
        start: how many tokens came before these.
    """

    prompt: int
    sample: int
    start: int = 0
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    logprobs: list[TokenLogprob] | None = None

    def encode(self) -> bytes:
        """The payload of a `TOKENS` record."""
        with_logprobs = self.logprobs is not None
        head = _TOKENS.pack(self.prompt, self.sample, self.start, len(self.token_ids), with_logprobs)
        return b"".join((head, _little_endian(self.token_ids).tobytes(), *map(_encode_logprob, self.logprobs or ())))

    @classmethod
    def decode(cls, payload: bytes) -> Generated:
        """The inverse of `encode`.

        Raises:
            DataError: the payload does not hold what it says.
        """
        try:
            prompt, sample, start, count, with_logprobs = _TOKENS.unpack_from(payload)
            at = _TOKENS.size + 4 * count
            ids = array("I", payload[_TOKENS.size : at])
            if len(ids) != count:
                raise DataError("it lacks token ids")
            ids = _little_endian(ids)
            logprobs = _decode_logprobs(payload, at, ids) if with_logprobs else None
        except (struct.error, ValueError) as error:
            raise DataError(f"it is too short: {error}") from None
        return cls(prompt=prompt, sample=sample, start=start, token_ids=ids, logprobs=logprobs)

    def extend(self, more: Generated) -> None:
        """Adds what was generated after it.

        Raises:
            DataError: there is a gap between the two.
        """
        if more.start != len(self.token_ids):
            raise DataError(f"its tokens begin at {more.start}, but {len(self.token_ids)} came before")
        self.token_ids.extend(more.token_ids)
        if more.logprobs is not None:
            self.logprobs = (self.logprobs or []) + more.logprobs

    def resumed(self) -> Resumed:
        """As the engine takes it."""
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        return Resumed(token_ids=tuple(self.token_ids), logprobs=logprobs)


def _little_endian(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids = array("I", ids)
        ids.byteswap()
    return ids


def _encode_logprob(entry: TokenLogprob) -> bytes:
    tops = (_TOP.pack(token, logprob) for token, logprob in entry.top)
    return b"".join((_LOGPROB.pack(entry.logprob, len(entry.top)), *tops))


def _decode_logprobs(payload: bytes, at: int, ids: array[int]) -> list[TokenLogprob]:
    entries = []
    for token in ids:
        logprob, tops = _LOGPROB.unpack_from(payload, at)
        at += _LOGPROB.size
        top = tuple(_TOP.unpack_from(payload, at + i * _TOP.size) for i in range(tops))
        at += tops * _TOP.size
        entries.append(TokenLogprob(token_id=token, logprob=logprob, top=top))
    return entries
