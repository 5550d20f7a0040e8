"""The order in which the rows of a job wait: the longest of each window first.

Rows that end together are those that entered together, and what is left at the end of a job are the short ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

#: Windows are this many blocks.
WINDOW_BLOCKS = 8

_Row = TypeVar("_Row")


def longest_first(
    rows: Iterable[_Row], length: Callable[[_Row], int], window: int, group: Callable[[_Row], int] | None = None
) -> Iterator[_Row]:
    """The rows in windows of ``window``, each window sorted by length, the longest first, equal ones as they came.

    Args:
        rows: what is to be ordered; taken lazily, a window at a time.
        length: tokens that a row may reach.
        group: rows of a window with the same number from 0 on stay together, as early as the longest of them; default: none do.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, window)):
        chunk.sort(key=lambda row: -length(row))
        yield from chunk if group is None else _together(chunk, group)


def _together(rows: list[_Row], group: Callable[[_Row], int]) -> Iterator[_Row]:
    """Rows in this order, but each group as a whole where its first row is."""
    members: dict[int, list[_Row]] = {}
    for row in rows:
        if (number := group(row)) >= 0:
            members.setdefault(number, []).append(row)
    for row in rows:
        if (number := group(row)) < 0:
            yield row
        else:
            yield from members.pop(number, ())
