"""How many KV pages a tier will need, sweep by sweep, if every row in it grows to its expected end.

Pure arithmetic. Every row's future is known: it holds its prompt while it is prefilled, then grows by one token a
sweep until it ends. A new row may enter when the sum of all futures stays within the tier at every sweep to come.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import add, sub

from policies.admission.kv_pages import KVPages


def growth(
    tokens_after_prefill: int, prefill_sweeps: int, decode_sweeps: int, layout: KVPages, chunk: int = 1
) -> list[int]:
    """Pages that a row holds in each coming sweep.

    Args:
        tokens_after_prefill: tokens in the cache once its run so far is complete; all are reserved at once.
        prefill_sweeps: sweeps until then, at least 1.
        decode_sweeps: sweeps of one token each after that.
        layout: pages of a row.
        chunk: most tokens of a run until then.

    Returns:
        list[int]: one count per sweep, ``prefill_sweeps + decode_sweeps`` in all; with the prefill over it never falls again.
    """
    size, tokens = layout.page_tokens, tokens_after_prefill
    within = min(decode_sweeps, layout.covering(tokens) * size - tokens)
    curve = [layout.most(tokens, chunk)] * prefill_sweeps + [layout.held(tokens)] * within
    left = decode_sweeps - within
    while left > 0:
        tokens += size
        curve += [layout.held(tokens)] * min(left, size)
        left -= size
    return curve


class Projection:
    """The summed future of a tier's rows.

    Args:
        pages: pages of the tier.

    Attributes:
        held: pages that are in use for an unknown time, whatever the rows do.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self.held = 0
        self._now = 0
        self._usage: list[int] = []
        self._rows: dict[Hashable, tuple[int, Sequence[int]]] = {}

    @property
    def peak(self) -> int:
        """The most pages in use in any sweep to come."""
        return self.held + max(self._usage, default=0)

    def fits(self, curve: Sequence[int], held: int = 0) -> bool:
        """Whether a row with this future can be added, and so many more pages held. The rows that are there fit: each was asked
        about first."""
        room = self.pages - self.held - held
        return max(curve) <= room and max(map(add, self._usage, curve), default=0) <= room

    def add(self, row: Hashable, curve: Sequence[int]) -> None:
        """Add a row's future."""
        beyond = curve[len(self._usage) :]
        self._usage[: len(curve)] = map(add, self._usage, curve)
        self._usage += beyond
        self._rows[row] = (self._now, curve)

    def remove(self, row: Hashable) -> None:
        """Subtract what is left of a row's future."""
        start, curve = self._rows.pop(row)
        left = curve[self._now - start :]
        self._usage[: len(left)] = map(sub, self._usage, left)

    def lend(self, row: Hashable, pages: int) -> None:
        """So many of the row's pages are held for an unknown time from now on, whatever the row does."""
        start, curve = self._rows[row]
        self._rows[row] = start, [count - pages for count in curve]
        left = max(0, len(curve) - (self._now - start))
        self._usage[:left] = [count - pages for count in self._usage[:left]]
        self.held += pages

    def advance(self) -> None:
        """One sweep has passed."""
        self._now += 1
        del self._usage[:1]
