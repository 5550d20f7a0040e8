"""Beginnings that rows have in common: computed by one of them, then where the others begin.

A prefix is a number of whole KV pages. Prefixes form a tree: what rows have in common with a few others begins with what
they have in common with many. The first row that enters computes those of its prefixes that are in no tier; the rows that
would compute much of the same wait until it is done, outside of the queue, and are the next to enter then. A row whose
prefix is in another tier than its own gets a copy of the pages: a prefix is computed once, and its pages count once in each tier,
for as long as a row in flight holds them or a waiting one wants them. Pages that only waiting rows want are idle. They are
evicted when a row in flight needs the room, when nothing else can run, and beyond a share of the tier; rows that enter later
compute them again, if they are in no other tier.

Layers with a window give back pages that rows in flight have passed. Of them a prefix has those that the next token sees,
beside the rows' own, and the row that computes it stops there for a sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic

from policies.admission.kv_pages import KVPages
from policies.admission.kv_projection import Projection
from policies.admission.row_state import Prefix, PrefixPages, RowT

#: A row waits for a prefix that is being computed if that spares it this part of its tokens.
_WORTH_WAITING = 0.25
#: Idle pages are at most this part of a tier.
_IDLE_SHARE = 0.5


def shared_tokens(prompt: int, page_tokens: int) -> int:
    """Of a prompt what others can begin after: whole pages, and fewer tokens than it has."""
    return (prompt - 1) // page_tokens * page_tokens


def share(
    rows: Sequence[RowT], layout: KVPages, recompute_past: int | None, parent: Prefix[RowT] | None = None
) -> None:
    """Give the rows of a prompt, of which nobody knows what it says, its pages as their prefix.

    Rows whose keys are rotated otherwise than the first one's compute all of theirs themselves.

    Args:
        layout: pages of a row.
        recompute_past: as in `Admission`.
        parent: what the prompt has in common with others, where it is longer than that.
    """
    count_once(rows)
    tokens = shared_tokens(min(row.prompt for row in rows), layout.page_tokens)
    alike = [row for row in rows if row.is_past(recompute_past) == rows[0].is_past(recompute_past)]
    prefix = parent if parent is not None and parent.tokens <= tokens else None
    if len(alike) > 1 and tokens > (prefix.tokens if prefix else 0):
        prefix = Prefix(tokens=tokens, parent=prefix)
    for row in alike:
        row.prefix = prefix


def count_once(rows: Sequence[RowT]) -> None:
    """The first of the rows of a prompt counts its tokens for all of them."""
    for row in rows[1:]:
        row.prompt_done = row.prompt


class Prefixes(Generic[RowT]):
    """The prefixes of an `Admission`.

    Args:
        free: free pages per tier; the admission's own count, which is kept up to date here.
        projections: of each tier, likewise.
        layout: pages of a row.

    Attributes:
        reserved_places: rows that wait outside of the queue; places in the block are kept for them.
        opened: pages of prefixes that have been computed, with the row that did; the owner of the cache takes them from here.
        changes: what has happened to other pages, likewise, in the order in which it has to be done: those that are to be
            copied, with those of another tier that they are copied from, and those that are no longer needed, with None.
    """

    def __init__(self, free: dict[str, int], projections: Mapping[str, Projection], layout: KVPages):
        self._free, self._projections, self._layout = free, projections, layout
        self._idle: dict[PrefixPages[RowT], None] = {}
        self.reserved_places = 0
        self.opened: list[tuple[RowT, PrefixPages[RowT]]] = []
        self.changes: list[tuple[PrefixPages[RowT], PrefixPages[RowT] | None]] = []

    def want(self, row: RowT) -> None:
        """The row waits for its turn."""
        for prefix in row.prefix.path if row.prefix else ():
            prefix.wanted += 1

    def unwant(self, row: RowT) -> None:
        """The row waits no longer."""
        for prefix in reversed(row.prefix.path) if row.prefix else ():
            prefix.wanted -= 1
            for copy in list(prefix.copies.values()):
                self._settle(copy)

    def begun(self, row: RowT, tier: str) -> PrefixPages[RowT] | None:
        """The longest prefix of the row whose pages are there: in a tier, unless another one has more."""
        if row.prefix is None or row.computes_all:
            return None
        found = self._whole(row, tier)
        for other in self._free:
            copy = self._whole(row, other)
            if copy is not None and (found is None or copy.prefix.tokens > found.prefix.tokens):
                found = copy
        return found

    def copied_pages(self, found: PrefixPages[RowT] | None, tier: str) -> int:
        """Pages that a tier lacks of a prefix that is somewhere."""
        return sum(self._own_pages(prefix) for prefix in _lacking(found, tier))

    def covered(self, row: RowT, tier: str) -> int:
        """Tokens of the row whose pages are in a tier, or will be when the rows in flight have computed them."""
        return max((copy.prefix.tokens for copy in self._copies(row, tier)), default=0)

    def awaited(self, row: RowT) -> PrefixPages[RowT] | None:
        """What a row in flight computes, where that spares the row so much that it had better wait."""
        if row.prefix is None or row.computes_all:
            return None
        tier = max(self._free, key=lambda tier: self.covered(row, tier))
        there = self.begun(row, tier)
        begin, end = (there.prefix.tokens if there else 0), self.covered(row, tier)
        if end == begin or end - begin < _WORTH_WAITING * (row.length - begin):
            return None
        return next(copy for copy in self._copies(row, tier) if copy.maker is not None)

    def put_aside(self, row: RowT, copy: PrefixPages[RowT]) -> None:
        """The row waits until a prefix is there."""
        copy.aside[row] = None
        self.reserved_places += 1

    def take_back(self, row: RowT) -> bool:
        """The row no longer waits for a prefix to be there; returns whether it did."""
        for prefix in row.prefix.path if row.prefix else ():
            for copy in prefix.copies.values():
                if row in copy.aside:
                    del copy.aside[row]
                    self.reserved_places -= 1
                    return True
        return False

    def enter(self, row: RowT, copy: PrefixPages[RowT] | None) -> None:
        """A row with a prefix is in flight, after the pages of ``copy``, which its tier gets where it lacks them; it computes what
        is in no tier for the others."""
        if row.prefix is None:
            return
        if copy is not None:
            copy = self._brought(copy, row.tier)
            self._hold(row, copy)
            row.cached, row.shared_pages = copy.prefix.tokens, copy.shared_pages
        begin = copy.prefix.tokens if copy else 0
        for prefix in row.prefix.path:
            if prefix.tokens > begin:
                if prefix.copies:
                    break  # another row computes it
                prefix.copies[row.tier] = PrefixPages(prefix=prefix, tier=row.tier, maker=row)
        self.unwant(row)

    def next_end(self, row: RowT) -> int | None:
        """Tokens of the prefix that the row computes next for others; None where it computes none."""
        made = next(self.made(row), None)
        return None if made is None else made.prefix.tokens

    def computed(self, row: RowT) -> list[RowT]:
        """The row has computed more of its prompt; returns the rows that waited for that."""
        released: list[RowT] = []
        for copy in list(self.made(row)):
            if row.cached < copy.prefix.tokens:
                break
            released += self._release(copy)
            if not self._open(row, copy):
                return released + self.abandon(row)
        return released

    def abandon(self, row: RowT) -> list[RowT]:
        """The row computes nothing for others any longer; returns the rows that waited for that."""
        released: list[RowT] = []
        for copy in list(self.made(row)):
            released += self._release(copy)
            del copy.prefix.copies[copy.tier]
        return released

    def leave(self, row: RowT) -> list[RowT]:
        """The row is out of flight; returns the rows that waited for what it computed."""
        released = self.abandon(row)
        held, row.held, row.shared_pages = row.held, None, 0
        if held is not None:
            held.holders -= 1
            self._settle(held)
        return released

    def evict(self, tier: str | None = None, keep: RowT | None = None) -> bool:
        """Evict an idle prefix (of a tier), one that another tier has too or the one that fewest rows wait for; returns whether
        there was one.

        Args:
            keep: a row whose own prefixes go last.
        """
        own = keep.prefix.path if keep is not None and keep.prefix is not None else ()
        found = [copy for copy in self._idle if tier in (None, copy.tier)]
        if not found:
            return False

        def worth(copy: PrefixPages[RowT]) -> tuple[bool, bool, int, int]:
            return copy.prefix in own, len(copy.prefix.copies) == 1, copy.prefix.wanted, copy.prefix.tokens

        self._close(min(found, key=worth))
        return True

    def _copies(self, row: RowT, tier: str) -> Iterator[PrefixPages[RowT]]:
        """Of the row's prefixes in a tier, the shortest first, as far as each follows the one before."""
        for prefix in row.prefix.path if row.prefix else ():
            copy = prefix.copies.get(tier)
            if copy is None:
                return
            yield copy

    def _whole(self, row: RowT, tier: str) -> PrefixPages[RowT] | None:
        """The longest prefix of the row whose pages are in a tier."""
        found = None
        for copy in self._copies(row, tier):
            if copy.maker is not None:
                break
            found = copy
        return found

    def made(self, row: RowT) -> Iterator[PrefixPages[RowT]]:
        """What a row in flight computes for others, the shortest first."""
        return (copy for copy in self._copies(row, row.tier) if copy.maker is row)

    def _release(self, copy: PrefixPages[RowT]) -> list[RowT]:
        rows = list(copy.aside)
        self.reserved_places -= len(rows)
        copy.aside.clear()
        return rows

    def _open(self, row: RowT, copy: PrefixPages[RowT]) -> bool:
        """The pages are there: from now on they count by themselves. False where nobody wants them or there is no room."""
        tokens, tier = copy.prefix.tokens, copy.tier
        shared = self._layout.shared(tokens)
        own, beside = shared - row.shared_pages, self._layout.before(tokens) - shared
        projection = self._projections[tier]
        if not copy.prefix.wanted or beside > min(self._free[tier], projection.pages - projection.peak):
            return False
        copy.maker, copy.pages, copy.shared_pages = None, self._own_pages(copy.prefix), shared
        projection.lend(row, own)
        row.pages -= own
        row.shared_pages = shared
        self._charge(copy, beside)
        if row.held is not None:  # the longer prefix holds the shorter one now, and the row holds the longer one
            row.held.holders -= 1
        self._hold(row, copy)
        self._hold_above(copy)
        self.opened.append((row, copy))
        return True

    def _own_pages(self, prefix: Prefix[RowT]) -> int:
        """Pages that a prefix is charged with, those of shorter ones not among them."""
        before = self._layout.shared(prefix.parent.tokens) if prefix.parent is not None else 0
        return self._layout.before(prefix.tokens) - before

    def _brought(self, found: PrefixPages[RowT], tier: str) -> PrefixPages[RowT]:
        """The pages of a prefix in a tier, copied from where they are as far as the tier lacks them."""
        for prefix in _lacking(found, tier):
            copy = PrefixPages(
                prefix=prefix,
                tier=tier,
                maker=None,
                pages=self._own_pages(prefix),
                shared_pages=self._layout.shared(prefix.tokens),
            )
            prefix.copies[tier] = copy
            self._charge(copy, copy.pages)
            self._hold_above(copy)
            self.changes.append((copy, prefix.copies[found.tier]))
        return found.prefix.copies[tier]

    def _hold(self, row: RowT, copy: PrefixPages[RowT]) -> None:
        copy.holders += 1
        self._idle.pop(copy, None)
        row.held = copy

    def _hold_above(self, copy: PrefixPages[RowT]) -> None:
        """The pages are there, and hold those of the next shorter prefix."""
        if copy.prefix.parent is not None:
            copy.above = copy.prefix.parent.copies[copy.tier]
            copy.above.holders += 1
            self._idle.pop(copy.above, None)

    def _settle(self, copy: PrefixPages[RowT]) -> None:
        """Nobody in flight may hold it any longer: then it is idle, or closed where no row waits for it."""
        if copy.maker is not None or copy.holders:
            return
        if not copy.prefix.wanted:
            self._close(copy)
            return
        self._idle[copy] = None
        limit = _IDLE_SHARE * self._projections[copy.tier].pages
        while sum(idle.pages for idle in self._idle if idle.tier == copy.tier) > limit and self.evict(copy.tier):
            pass

    def _close(self, copy: PrefixPages[RowT]) -> None:
        self._idle.pop(copy, None)
        del copy.prefix.copies[copy.tier]
        self._charge(copy, -copy.pages)
        self.changes.append((copy, None))
        if copy.above is not None:
            copy.above.holders -= 1
            self._settle(copy.above)

    def _charge(self, copy: PrefixPages[RowT], pages: int) -> None:
        """Count so many more pages as held whatever the rows do."""
        self._free[copy.tier] -= pages
        self._projections[copy.tier].held += pages


def _lacking(found: PrefixPages[RowT] | None, tier: str) -> list[Prefix[RowT]]:
    """The prefixes that a tier lacks of one that is somewhere, and of those that it begins with; the shortest first."""
    return [prefix for prefix in found.prefix.path if tier not in prefix.copies] if found is not None else []
