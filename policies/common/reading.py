"""What means nothing in a file that a user wrote: a byte order mark, null for a field, the point in 8.0."""

from __future__ import annotations

import codecs
from typing import Any, AnyStr


def without_bom(text: AnyStr) -> AnyStr:
    """A text, or its UTF-8 bytes, without the byte order mark that editors put before it."""
    if isinstance(text, bytes):
        return text.removeprefix(codecs.BOM_UTF8)
    return text.removeprefix("\ufeff")


def without_nulls(value: Any) -> Any:
    """A JSON value whose objects, at every depth, lack the fields that are null. Items of lists stay as they are."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) if isinstance(item, (dict, list)) else item for item in value]
    return value


def whole(value: object) -> int | None:
    """The whole number that a JSON value is, 8 for 8.0 too; None for any other value."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
