"""A row as admission knows it: lengths and counts, and nothing of what it says; and the beginnings that rows have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        pages: KV pages that it holds by itself, those of the run under way included.
        run: tokens of its run in the sweep under way, 0 where it has none.
        logits: whether that run ends with a new token; false for an unfinished prompt.
        prompt_done: prompt tokens that have been computed at least once; a restart does not count them again.
        prefix: the longest beginning that it has in common with other rows; None where it has none.
        held: the pages of that, or of a shorter one, which it holds together with others; None: all pages are its own.
        shared_pages: pages of ``held`` that count once for all who hold them, and not among ``pages``.
        computes_all: it begins no later than its first token, since something is wanted of every one.
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
    held: PrefixPages[Any] | None = None
    shared_pages: int = 0
    computes_all: bool = False
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
        tokens: a whole number of pages, at least one, and fewer than any of the rows' prompts has.
        parent: the next shorter beginning that some of the rows have in common with still others.
        wanted: rows that wait for their turn and begin so.
        path: the beginnings from the shortest one to this one.
        copies: where its pages are, by tier; or, where they are in none, where a row computes them.
    """

    tokens: int
    parent: Prefix[RowT] | None = None
    wanted: int = 0
    path: tuple[Prefix[RowT], ...] = ()
    copies: dict[str, PrefixPages[RowT]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = (*(self.parent.path if self.parent else ()), self)


@dataclass(slots=True, kw_only=True, eq=False)
class PrefixPages(Generic[RowT]):
    """The pages of a prefix in a tier.

    Attributes:
        maker: the row in flight that computes it; None once it is there, or is a copy of another tier's.
        aside: rows that wait until it is there.
        pages: that it is charged with, those of shorter prefixes not among them.
        shared_pages: those that rows which hold it need not count, those of shorter prefixes among them.
        holders: rows in flight, and longer prefixes, that hold it.
        above: of those that are there, the pages of the next shorter prefix, which it holds.
        kv: what the owner of the cache keeps of it.
    """

    prefix: Prefix[RowT]
    tier: str
    maker: RowT | None
    aside: dict[RowT, None] = field(default_factory=dict)
    pages: int = 0
    shared_pages: int = 0
    holders: int = 0
    above: PrefixPages[RowT] | None = None
    kv: Any = None
