"""The order in which the rows of a job wait: those of each window that generate most first.

A row is in flight for as many sweeps as it generates tokens, however long its prompt. So rows that end together are those that
entered together, and what is left at the end of a job are the short ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

#: Windows are this many blocks.
WINDOW_BLOCKS = 8

_Row = TypeVar("_Row")


def longest_first(
    rows: Iterable[_Row],
    length: Callable[[_Row], tuple[int, int]],
    window: int,
    group: Callable[[_Row], int] | None = None,
) -> Iterator[_Row]:
    """The rows in windows of ``window``, each window sorted by length, the longest first, equally long ones as they came.

    Args:
        rows: what is to be ordered; taken lazily, a window at a time.
        length: tokens that a row is expected to generate, and those of its prompt.
        group: rows of a window with the same number from 0 on stay together, as early as the longest of them; default: none do.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, window)):
        chunk.sort(key=length, reverse=True)
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
