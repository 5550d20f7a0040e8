"""How long the rows of a workload are: the means that the closed forms need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from cost_model.memory.allocation import PAGE_TOKENS
from policies.workload import Workload


@dataclass(frozen=True, slots=True)
class RowMoments:
    """Means over the rows of a workload.

    Attributes:
        s, n: prompt and completion.
        ss, ns, nn: s², (n − 1) · s, (n − 1) · n.
        held: KV tokens in whole pages at the end of a row; where rows differ, of a mean one.
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
        held=ceil((mean(lambda s, n: s + n) - 1) / PAGE_TOKENS) * PAGE_TOKENS,
        mixed=len(entries) > 1,
    )
