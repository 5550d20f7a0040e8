"""How long the rows of a workload are: the means that the closed forms need, and when rows end."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil

from cost_model.memory.allocation import PAGE_TOKENS
from policies.workload import Workload


@dataclass(frozen=True, slots=True)
class RowMoments:
    """Means over the rows of a workload, and when they end.

    Attributes:
        s, n: prompt and completion.
        ss, ns, nn: s², (n − 1) · s, (n − 1) · n.
        held: KV tokens in whole pages, per row, when rows that entered together hold most.
        ends: (n, share of the rows that generate no more), n rising.
    """

    s: float
    n: float
    ss: float
    ns: float
    nn: float
    held: float
    ends: tuple[tuple[int, float], ...]

    @property
    def mixed(self) -> bool:
        """Whether rows end after different numbers of tokens."""
        return len(self.ends) > 1

    def alive(self, sweeps: float) -> float:
        """Share of the rows that generate more than so many tokens."""
        at = bisect_right(self.ends, (sweeps, 2.0))
        return 1.0 - self.ends[at - 1][1] if at else 1.0

    def mean_alive(self, start: float, end: float) -> float:
        """Mean of `alive` between two ages."""
        if end <= start:
            return self.alive(start)
        inner = [start, *(float(n) for n, _ in self.ends if start < n < end), end]
        return sum((b - a) * self.alive(a) for a, b in pairwise(inner)) / (end - start)

    def longest(self, rows: float) -> float:
        """Tokens that the longest of so many rows generates."""
        return float(next((n for n, share in self.ends if rows * (1 - share) <= 0.5), self.ends[-1][0]))


@lru_cache(maxsize=64)
def row_moments(workload: Workload) -> RowMoments:
    """Those of a workload."""
    entries = workload.lengths or ((workload.prompt_len, workload.gen_len, 1),)
    rows = sum(count for _, _, count in entries)

    def mean(value) -> float:
        return sum(value(s, n) * count for s, n, count in entries) / rows

    return RowMoments(
        s=mean(lambda s, n: s),
        n=mean(lambda s, n: n),
        ss=mean(lambda s, n: s * s),
        ns=mean(lambda s, n: (n - 1) * s),
        nn=mean(lambda s, n: (n - 1) * n),
        held=_most_held(entries, rows),
        ends=_ends(entries, rows),
    )


def _most_held(entries, rows: int) -> float:
    """Tokens in whole pages per row when rows that entered together hold most; the short ones may have ended by then."""
    left, prompts, most = 0, 0.0, 0.0
    waste = 0.0 if len(entries) == 1 else PAGE_TOKENS / 2
    for s, n, count in sorted(entries, key=lambda entry: -entry[1]):
        left, prompts = left + count, prompts + s * count
        most = max(most, prompts + left * (n - 1 + waste))
    return ceil(most / rows / PAGE_TOKENS) * PAGE_TOKENS if len(entries) == 1 else most / rows


def _ends(entries, rows: int) -> tuple[tuple[int, float], ...]:
    by_length: dict[int, int] = {}
    for _, n, count in entries:
        by_length[n] = by_length.get(n, 0) + count
    lengths = sorted(by_length)
    return tuple(zip(lengths, (total / rows for total in accumulate(by_length[n] for n in lengths)), strict=True))
