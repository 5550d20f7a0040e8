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


def longest_first(rows: Iterable[_Row], length: Callable[[_Row], int], window: int) -> Iterator[_Row]:
    """The rows in windows of ``window``, each window sorted by length, the longest first, equal ones as they came.

    Args:
        rows: what is to be ordered; taken lazily, a window at a time.
        length: tokens that a row may reach.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, window)):
        chunk.sort(key=lambda row: -length(row))
        yield from chunk
