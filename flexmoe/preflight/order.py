"""The order in which a job's rows are worked on: the longest first, so that the peak of memory comes early.

Within a window only: over the whole job, the rows in flight would all be long at the beginning and all short at the end,
and what a block holds would never be the mixture that it was planned for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

#: Windows are this many blocks.
WINDOW_BLOCKS = 8


def longest_first(rows: Iterable[int], lengths: Sequence[int], window: int) -> Iterator[int]:
    """The rows in windows of `window`, each window sorted by length, the longest first, equal ones as they came.

    Args:
        rows: what is to be ordered; taken lazily, a window at a time.
        lengths: tokens that each row may reach, by row.
    """
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, window)):
        chunk.sort(key=lambda row: -lengths[row])
        yield from chunk
