"""What means nothing in a file that a user wrote: a byte order mark, null for a field, the point in 8.0."""

from __future__ import annotations

import codecs
from collections.abc import Collection
from typing import Any, AnyStr


def without_bom(text: AnyStr) -> AnyStr:
    """A text, or its UTF-8 bytes, without the byte order mark that editors put before it."""
    if isinstance(text, bytes):
        return text.removeprefix(codecs.BOM_UTF8)
    return text.removeprefix("\ufeff")


def without_nulls(value: Any, kept: Collection[str] = ()) -> Any:
    """A JSON value whose objects, at every depth, lack the fields that are null. Items of lists stay as they are.

    Args:
        kept: names of fields whose values stay as they are: null means something there.
    """
    if isinstance(value, dict):
        some = ((key, item) for key, item in value.items() if item is not None)
        return {key: item if key in kept else without_nulls(item, kept) for key, item in some}
    if isinstance(value, list):
        return [without_nulls(item, kept) if isinstance(item, (dict, list)) else item for item in value]
    return value


def whole(value: object) -> int | None:
    """The whole number that a JSON value is, 8 for 8.0 too; None for any other value."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
