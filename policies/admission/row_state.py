"""A row as admission knows it: lengths and counts, and nothing of what it says; and the prefix that it may share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar


class AttentionMode(Enum):
    """Where a row is attended, in the order in which rows lie in a block.

    ``GPU``: on the GPU, where its KV lives. ``FETCH``: on the GPU, and its KV is brought there from another tier in
    every sweep. ``CPU``: on the host, where its KV lives.
    """

    GPU = "gpu"
    FETCH = "fetch"
    CPU = "cpu"


@dataclass(slots=True, kw_only=True, eq=False)
class RowLengths:
    """A row as admission sees it: how long it is, and what it holds while it is in flight.

    Attributes:
        prompt: tokens of the prompt, at least 1.
        limit: length at which the row ends, prompt included.
        generated: tokens generated so far.
        tier: where its KV lives while in flight, "" while it waits.
        mode: where it is attended while in flight; of no meaning while it waits.
        cached: tokens whose KV is stored.
        pages: KV pages that it holds, those of the run under way included.
        run: tokens of its run in the sweep under way, 0 where it has none.
        logits: whether that run ends with a new token; false for an unfinished prompt.
        prompt_done: prompt tokens that have been computed at least once; a restart does not count them again.
        prefix: the beginning of the prompt that it computes for others, or will begin after; None where it has none.
        shares: whether it holds the prefix.
        stale: its KV has to be computed anew before it resumes.
        urgent: it enters before all that are not, in whose place it is.
    """

    prompt: int
    limit: int
    generated: int = 0
    tier: str = ""
    mode: AttentionMode = AttentionMode.GPU
    cached: int = 0
    pages: int = 0
    run: int = 0
    logits: bool = False
    prompt_done: int = 0
    prefix: Prefix[Any] | None = None
    shares: bool = False
    stale: bool = False
    urgent: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what was generated."""
        return self.prompt + self.generated

    def is_past(self, bound: int | None) -> bool:
        """Whether it is longer than ``bound``; None is no bound."""
        return bound is not None and self.length > bound


RowT = TypeVar("RowT", bound=RowLengths)


@dataclass(slots=True, kw_only=True, eq=False)
class Prefix(Generic[RowT]):
    """Tokens at the beginning of some rows.

    Attributes:
        tokens: a whole number of pages, at least one, and fewer than the prompt has: every row ends its own prompt.
        pages: those of them that a run behind it sees, in all layers.
        waiting: the rows that have not entered yet, in order; the one that computes the prefix is not among them.
        tier: where it is; "" before it is computed, and when nobody waits for it any longer.
        sharers: rows in flight that hold it.
    """

    tokens: int
    pages: int
    waiting: dict[RowT, None]
    tier: str = ""
    sharers: int = 0
