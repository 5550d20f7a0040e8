"""How long the rows of a workload are: the means that the closed forms need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from cost_model.memory.allocation import PAGE_TOKENS
from policies.workload import Histogram, Workload


@dataclass(frozen=True, slots=True)
class RowMoments:
    """Means over the rows of a workload.

    Attributes:
        s, n: prompt and completion.
        ss, ns, nn: s², (n − 1) · s, (n − 1) · n.
        held: KV tokens in whole pages, per row, when rows that entered together hold most.
        mixed: whether rows differ.
    """

    s: float
    n: float
    ss: float
    ns: float
    nn: float
    held: float
    mixed: bool


@lru_cache(maxsize=64)
def row_moments(workload: Workload) -> RowMoments:
    """Those of a workload."""
    entries = workload.lengths or ((workload.prompt_len, workload.gen_len, 1),)
    rows = sum(count for _, _, count in entries)

    def mean(value: Callable[[int, int], float]) -> float:
        return sum(value(s, n) * count for s, n, count in entries) / rows

    return RowMoments(
        s=mean(lambda s, n: s),
        n=mean(lambda s, n: n),
        ss=mean(lambda s, n: s * s),
        ns=mean(lambda s, n: (n - 1) * s),
        nn=mean(lambda s, n: (n - 1) * n),
        held=_most_held(entries, rows),
        mixed=len(entries) > 1,
    )


def _most_held(entries: Histogram, rows: int) -> float:
    """Tokens in whole pages per row when rows that entered together hold most; the short ones may have ended by then.

    They hold most just before some of them end: then those of at least n generated tokens are left, and hold their prompts
    and n - 1 tokens each, as the last one a row generates never enters the cache. Rows of many lengths waste half a page each
    on average; of rows that are all alike the pages are counted.
    """
    left, prompts, most = 0, 0.0, 0.0
    waste = 0.0 if len(entries) == 1 else PAGE_TOKENS / 2
    for s, n, count in sorted(entries, key=lambda entry: -entry[1]):
        left, prompts = left + count, prompts + s * count
        most = max(most, prompts + left * (n - 1 + waste))
    return ceil(most / rows / PAGE_TOKENS) * PAGE_TOKENS if len(entries) == 1 else most / rows
