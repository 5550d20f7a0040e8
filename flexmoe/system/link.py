"""The link up to the device, which weights share with small transfers that the device waits for.

A link copies in the order in which copies are issued, whatever their streams. So large ones are issued piece by piece, no more
than two ahead, and each only when the small ones that have been issued meanwhile are there.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Protocol

#: Size of a piece at most; those of a copy are alike, so that a piece of a large one has more than half of it.
PIECE_BYTES = 16 << 20
_PIECES_AHEAD = 2


class Passing(Protocol):
    """An event."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Wait until it has passed."""


class Link:
    """What is under way up to the device; for all threads that issue copies."""

    def __init__(self) -> None:
        self._small: deque[Passing] = deque()
        self._pieces: deque[Passing] = deque()

    def small(self, event: Passing) -> None:
        """A small transfer has been issued on a stream where nothing large is before it; the event is recorded behind it."""
        with contextlib.suppress(
            IndexError
        ):  # of those that are there nobody may ask again: all weights may be on the device
            while self._small[0].query():
                self._small.popleft()
        self._small.append(event)

    def piece(self, event: Passing) -> None:
        """A piece of a large copy has been issued."""
        self._pieces.append(event)

    def give_way(self) -> None:
        """Wait until a piece may be issued."""
        with contextlib.suppress(IndexError):  # another thread may have taken the last one
            while True:
                self._small.popleft().synchronize()
        with contextlib.suppress(IndexError):
            while len(self._pieces) >= _PIECES_AHEAD:
                self._pieces.popleft().synchronize()


def pieces_of(nbytes: int) -> Iterator[slice]:
    """Pieces of so many bytes, all alike."""
    count = max(1, -(-nbytes // PIECE_BYTES))
    bounds = [nbytes * at // count for at in range(count + 1)]
    return (slice(start, stop) for start, stop in zip(bounds, bounds[1:]))
