"""The beginning of a prompt that several rows share: computed by one of them, then where the others begin.

A prefix is a number of whole KV pages. The row that computes it enters like any other; the rest wait outside of the queue
until it is computed, and then enter, next of all, with these tokens in the cache. What is saved is computation: every
row in flight counts the shared pages as its own, because the buffers that KV is gathered in are made for the sum of
what rows hold. While rows still wait and nobody in flight holds the prefix, it counts for itself; it is forgotten when
somebody in flight needs the room, and rows that come later then compute their prompts themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policies.admission.kv_projection import Projection

if TYPE_CHECKING:
    from policies.admission.row_state import RowLengths


@dataclass(slots=True, kw_only=True, eq=False)
class Prefix:
    """Tokens at the beginning of some rows.

    Attributes:
        tokens: a whole number of pages, at least one, and fewer than the prompt has: every row ends its own prompt.
        pages: as many.
        waiting: the rows that have not entered yet, in order; the one that computes the prefix is not among them.
        tier: where it is; "" before it is computed, and when nobody waits for it any longer.
        sharers: rows in flight that hold it.
    """

    tokens: int
    pages: int
    waiting: dict[RowLengths, None]
    tier: str = ""
    sharers: int = 0


class Prefixes:
    """What becomes of the prefixes of an `Admission`, whose books these are.

    Args:
        free: free pages per tier.
        projections: of each tier.

    Attributes:
        promised: places in the block that rows of prefixes begun will want.
        closed: prefixes that are no longer needed, for the owner of the cache to take from here.
    """

    def __init__(self, free: dict[str, int], projections: Mapping[str, Projection]):
        self._free, self._projections = free, projections
        self._idle: dict[Prefix, None] = {}
        self.promised = 0
        self.closed: list[Prefix] = []

    def spare(self, prefix: Prefix) -> int:
        """Pages that a row which enters with it takes over."""
        return prefix.pages if prefix in self._idle else 0

    def enter(self, row: RowLengths, shares: bool) -> None:
        """A row with a prefix is in flight; ``shares`` says whether it begins after it."""
        prefix = row.prefix
        if row not in prefix.waiting:  # it computes the prefix
            self.promised += len(prefix.waiting)
            return
        if shares:
            if prefix in self._idle:
                self._hold(prefix, -1)
            self._free[prefix.tier] -= prefix.pages
            prefix.sharers += 1
            row.shares, row.cached, row.pages = True, prefix.tokens, prefix.pages
        self.drop(row)
        if not shares:
            row.prefix = None

    def computed(self, row: RowLengths) -> Iterable[RowLengths]:
        """The row has computed its prefix; returns those that may enter now."""
        prefix = row.prefix
        if row.shares or row.cached < prefix.tokens:
            return ()
        prefix.tier, prefix.sharers, row.shares = row.tier, 1, True
        return prefix.waiting

    def leave(self, row: RowLengths) -> None:
        """A row with a prefix is out of flight, and its pages have been given back."""
        prefix = row.prefix
        if not row.shares:  # it has not computed the prefix yet
            self.promised -= len(prefix.waiting)
            return
        row.prefix, row.shares = None, False
        prefix.sharers -= 1
        if prefix.tier and not prefix.sharers:
            self._hold(prefix, 1)

    def drop(self, row: RowLengths) -> None:
        """A row no longer waits for its prefix."""
        prefix = row.prefix
        if row not in prefix.waiting:
            return
        del prefix.waiting[row]
        self.promised -= 1
        if not prefix.waiting:
            self._close(prefix)

    def forget(self, tier: str | None = None) -> bool:
        """Give up a prefix (of a tier) that nobody in flight holds; returns whether there was one."""
        prefix = next((p for p in self._idle if tier in (None, p.tier)), None)
        if prefix is None:
            return False
        for row in prefix.waiting:
            row.prefix = None
        self.promised -= len(prefix.waiting)
        prefix.waiting.clear()
        self._close(prefix)
        return True

    def _close(self, prefix: Prefix) -> None:
        if prefix in self._idle:
            self._hold(prefix, -1)
        prefix.tier = ""
        self.closed.append(prefix)

    def _hold(self, prefix: Prefix, sign: int) -> None:
        """From now on the prefix counts for itself (``sign`` 1), or no longer does (-1)."""
        if sign > 0:
            self._idle[prefix] = None
        else:
            del self._idle[prefix]
        self._free[prefix.tier] -= sign * prefix.pages
        self._projections[prefix.tier].held += sign * prefix.pages
