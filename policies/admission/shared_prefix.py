"""The beginning of a prompt that several rows share: computed by one of them, then where the others begin.

A prefix is a number of whole KV pages. The row that computes it enters like any other. The rest wait outside of the
queue until it is computed; then they are the next to enter, with these tokens in the cache. What is saved is
computation: every row in flight counts the shared pages as its own, because the buffers that KV is gathered in are made
for the sum of what rows hold. A prefix that rows still wait for is kept when no row in flight holds it: then its pages
are counted once, as idle. It is evicted when a row in flight needs the room, and rows that enter later compute their
prompts themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic

from policies.admission.kv_pages import KVPages
from policies.admission.kv_projection import Projection
from policies.admission.row_state import Prefix, RowT


def shared_tokens(prompt: int, page_tokens: int) -> int:
    """Of a prompt what others can begin after: whole pages, and fewer tokens than it has."""
    return (prompt - 1) // page_tokens * page_tokens


def share(
    rows: Sequence[RowT], layout: KVPages, recompute_past: int | None, prefix: Callable[..., Prefix[Any]] = Prefix
) -> list[RowT]:
    """Let the first of the rows of a prompt compute its pages for the others.

    Those whose keys are rotated otherwise than the first one's compute all of theirs themselves.

    Args:
        layout: pages of a row.
        recompute_past: as in `Admission`.
        prefix: makes the prefix.

    Returns:
        list[RowT]: the rows that wait in the queue; the others wait for the prefix.
    """
    first, *others = rows
    for row in others:
        row.prompt_done = row.prompt  # the first row counts these tokens
    tokens = shared_tokens(min(row.prompt for row in rows), layout.page_tokens)
    if layout.windowed and first.generated:
        tokens = 0  # when its run is stored, layers with a window have nothing of the prompt's end left
    alike = [row for row in others if row.is_past(recompute_past) == first.is_past(recompute_past)]
    if tokens and alike:
        found = prefix(tokens=tokens, pages=layout.before(tokens), waiting=dict.fromkeys(alike))
        for row in (first, *alike):
            row.prefix = found
    return [first, *(row for row in others if row.prefix is None)]


class Prefixes(Generic[RowT]):
    """The shared prefixes of an `Admission`.

    Args:
        free: free pages per tier; the admission's own count, which is kept up to date here.
        projections: of each tier, likewise.

    Attributes:
        reserved_places: places in the block that are kept for rows whose prefix is computed or being computed.
        closed: prefixes that are no longer needed; the owner of the cache frees them and takes them from here.
    """

    def __init__(self, free: dict[str, int], projections: Mapping[str, Projection]):
        self._free, self._projections = free, projections
        self._idle: dict[Prefix[RowT], None] = {}
        self.reserved_places = 0
        self.closed: list[Prefix[RowT]] = []

    def spare(self, prefix: Prefix[RowT]) -> int:
        """Pages of an idle prefix: a row that enters with it counts them as its own from then on."""
        return prefix.pages if prefix in self._idle else 0

    def enter(self, row: RowT, prefix: Prefix[RowT], shares: bool) -> None:
        """A row with a prefix is in flight; ``shares`` says whether it begins after it."""
        if row not in prefix.waiting:  # it computes the prefix
            self.reserved_places += len(prefix.waiting)
            return
        if shares:
            if prefix in self._idle:
                self._end_idle(prefix)
            self._free[prefix.tier] -= prefix.pages
            prefix.sharers += 1
            row.shares, row.cached, row.pages = True, prefix.tokens, prefix.pages
        self.drop(row, prefix)
        if not shares:
            row.prefix = None

    def computed(self, row: RowT, prefix: Prefix[RowT]) -> Iterable[RowT]:
        """The row has computed its prefix, or a part of it; returns those that may enter now."""
        if row.shares or row.cached < prefix.tokens:
            return ()
        prefix.tier, prefix.sharers, row.shares = row.tier, 1, True
        return prefix.waiting

    def leave(self, row: RowT, prefix: Prefix[RowT]) -> None:
        """A row with a prefix is out of flight, and its pages have been given back."""
        if not row.shares:  # it has not computed the prefix yet
            self.reserved_places -= len(prefix.waiting)
            return
        row.prefix, row.shares = None, False
        prefix.sharers -= 1
        if prefix.tier and not prefix.sharers:
            self._idle[prefix] = None
            self._charge(prefix, prefix.pages)

    def drop(self, row: RowT, prefix: Prefix[RowT]) -> None:
        """A row no longer waits for its prefix."""
        if row not in prefix.waiting:
            return
        del prefix.waiting[row]
        self.reserved_places -= 1
        if not prefix.waiting:
            self._close(prefix)

    def evict(self, tier: str | None = None) -> bool:
        """Evict an idle prefix (of a tier); returns whether there was one."""
        prefix = next((p for p in self._idle if tier in (None, p.tier)), None)
        if prefix is None:
            return False
        for row in prefix.waiting:
            row.prefix = None
        self.reserved_places -= len(prefix.waiting)
        prefix.waiting.clear()
        self._close(prefix)
        return True

    def _close(self, prefix: Prefix[RowT]) -> None:
        if prefix in self._idle:
            self._end_idle(prefix)
        prefix.tier = ""
        self.closed.append(prefix)

    def _end_idle(self, prefix: Prefix[RowT]) -> None:
        del self._idle[prefix]
        self._charge(prefix, -prefix.pages)

    def _charge(self, prefix: Prefix[RowT], pages: int) -> None:
        """Count so many more pages as held by nobody in flight."""
        self._free[prefix.tier] -= pages
        self._projections[prefix.tier].held += pages
