"""What the sweeps did: sums over all of them, and the last ones one by one; a job may have millions."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

#: Sweeps that are kept one by one.
KEPT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What one sweep did: ``tokens`` of the rows' runs, in ``computed_tokens`` positions of the hidden states."""

    wall_s: float
    rows: int
    tokens: int
    computed_tokens: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(slots=True, kw_only=True)
class SweepTotals:
    """Sums over all sweeps.

    Attributes:
        most_rows: the most of any sweep.
        prefill_s, decode_s: seconds of the sweeps into which prompt tokens entered, and of the others.
        decode_tokens: generated in those others.
    """

    wall_s: float = 0.0
    rows: int = 0
    most_rows: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0

    def add(self, sweep: Sweep) -> None:
        """One more sweep."""
        self.wall_s += sweep.wall_s
        self.rows += sweep.rows
        self.most_rows = max(self.most_rows, sweep.rows)
        self.tokens += sweep.tokens
        self.computed_tokens += sweep.computed_tokens
        self.prompt_tokens += sweep.prompt_tokens
        self.generated_tokens += sweep.generated_tokens
        if sweep.prompt_tokens:
            self.prefill_s += sweep.wall_s
        else:
            self.decode_s += sweep.wall_s
            self.decode_tokens += sweep.generated_tokens


class SweepLog:
    """The sweeps of an engine, numbered from 0; its length counts those too that are no longer kept.

    Attributes:
        totals: over all sweeps.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.totals = SweepTotals()
        self._count = 0
        self._latest: deque[Sweep] = deque(maxlen=kept)

    def add(self, sweep: Sweep) -> None:
        """One more sweep."""
        self.totals.add(sweep)
        self._latest.append(sweep)
        self._count += 1

    def since(self, number: int) -> list[Sweep]:
        """The sweeps from this number on, as far as they are kept."""
        forgotten = self._count - len(self._latest)
        return list(itertools.islice(self._latest, max(0, number - forgotten), None))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sweep]:
        """Those that are kept."""
        return iter(self._latest)
