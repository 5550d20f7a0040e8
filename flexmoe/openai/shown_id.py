"""The `custom_id` of a line that is no valid JSON, where it still shows one."""

from __future__ import annotations

import re
from typing import Any

from policies.common import json_files

_KEY = re.compile(rb'"custom_id"[ \t]*:[ \t]*("[^"]*"|-?[0-9]{1,18}(?![0-9.eE]))')
_STRING = re.compile(rb'"[^"]*(?:"|\Z)')
#: A longer one is no id, whatever its characters are.
_MAX_BYTES = 12 * 1024


def shown_id(line: bytes) -> Any:
    """The text or whole number that the outermost object of a line gives as its `custom_id`.

    A key that is given twice counts with its last value, as JSON parsers have it. The time grows with the length of the
    line alone, whatever it holds.

    Returns:
        None where there is none, or where it is at fault itself.
    """
    # Of the same length, so that places stay: without escapes, every quote begins or ends a string.
    plain = line.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    if not plain.lstrip().startswith(b"{"):
        return None
    found, depth, last, inside = None, 0, 0, b""
    for match in _KEY.finditer(plain):
        between = inside + plain[last : match.start()]
        outside = _STRING.sub(b"", between)
        depth += sum(map(outside.count, (b"{", b"["))) - sum(map(outside.count, (b"}", b"]")))
        inside, last = b'"' * (between.count(b'"') % 2), match.start()
        if depth == 1 and not inside:
            found = match.span(1)
    return None if found is None else _value(line[slice(*found)])


def _value(literal: bytes) -> Any:
    try:
        value = json_files.parse(literal) if len(literal) <= _MAX_BYTES else None
        str(value).encode("utf-8")  # half of a surrogate pair is no text
        return value
    except ValueError:
        return None
