"""The JSON of one line, read so that no two readers could understand it differently, and how a value is quoted back."""

from __future__ import annotations

import json
import re
from typing import Any

from flexmoe.errors import DataError
from policies.common import json_files
from policies.common.reading import whole

MAX_LINE_BYTES = 16 * 2**20
#: A request needs five levels; a JSON schema among its fields may need a few dozen.
MAX_DEPTH = 100
MAX_INT = 2**31 - 1
#: Fields that hold JSON Schemas, or values that may follow one: null means something in them.
SCHEMA_FIELDS = frozenset({"schema", "json", "parameters", "arguments"})
_ID_TEXT = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?")
_LONGEST_SHOWN = 80
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class InvalidLine(DataError):
    """A line that cannot be understood as a request.

    Args:
        param: the field at fault, where it is one.
        custom_id: of the line, where it could be read.
    """

    def __init__(self, message: str, *, param: str | None = None, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.param, self.custom_id = param, custom_id

    def at(self, place: str) -> InvalidLine:
        """The same fault, with where it is."""
        return InvalidLine(f"{place}: {self}", param=self.param, custom_id=self.custom_id)


def parse_json(line: bytes) -> Any:
    """The value of a line.

    Raises:
        InvalidLine: it is not JSON, or JSON that is read differently by different readers.
    """
    if len(line) > MAX_LINE_BYTES:
        raise too_long()
    try:
        # C parsers count levels differently between Python versions, so the limit is our own.
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
            raise RecursionError
        value = json_files.parse(line)
        # A lone surrogate (\ud800) is legal JSON but no text: neither a tokenizer nor the output file could hold it.
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json_files.RepeatedKeyError as error:
        raise InvalidLine(f"the key {show(error.keys[0])} is given twice in one object; keep one") from None
    except json_files.NotFiniteError as error:
        if error.literal in ("NaN", "Infinity", "-Infinity"):
            raise InvalidLine(f"{error.literal} is not JSON; write a number or null") from None
        raise InvalidLine(f"the number {error.literal[:40]} is out of range; write a smaller one") from None
    except UnicodeDecodeError as error:
        raise InvalidLine(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise InvalidLine("a string holds half of a surrogate pair (\\ud800 to \\udfff); remove it") from None
    except RecursionError:
        raise InvalidLine(f"the JSON is nested too deeply, beyond {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise InvalidLine(f"not valid JSON ({error}); write one JSON object per line") from None
    except ValueError:  # Python reads no more than some thousand
        raise InvalidLine("a number has too many digits; write a shorter one") from None


def too_long() -> InvalidLine:
    """The fault of a line that is longer than a line may be."""
    return InvalidLine(f"the line is longer than {MAX_LINE_BYTES} bytes; put one request on each line")


def _depth(line: bytes) -> int:
    """Levels of brackets outside strings; right for every valid JSON text, which is all that matters."""
    outside = b"".join(line.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    depth = most = 0
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        most = max(most, depth)
    return most


def token_ids(items: Any, name: str) -> tuple[int, ...]:
    """A list of token ids.

    Raises:
        InvalidLine: it is no list, or holds something that is no id of any vocabulary.
    """
    if not isinstance(items, list):
        raise InvalidLine(f"{name} is {show(items)}; give a list of token ids", param=name)
    ids = []
    for item in items:
        number = whole(item)
        if number is None or not 0 <= number <= MAX_INT:
            raise InvalidLine(
                f"{name} holds {show(item)}, which is no token id; ids are whole numbers from 0", param=name
            )
        ids.append(number)
    return tuple(ids)


def token_id_of(key: str) -> int | None:
    """The token id that a key of an object spells, as a number of JSON would; negative ones too, None for another text."""
    spelled = _ID_TEXT.fullmatch(key)
    return None if spelled is None else whole(float(key) if spelled[1] or spelled[2] else int(key))


def show(value: Any) -> str:
    """A value as an error sentence quotes it: as JSON, and short."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # an int of more digits than Python prints
        return "a very large number"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}…"
