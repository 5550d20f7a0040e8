"""The rows of a job in the order in which they wait: (prompt tokens, generated tokens) of each."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, repeat

from policies.workload import Workload

#: The golden ratio: its multiples, taken modulo 1, fill the unit interval evenly, however many are taken.
_GOLDEN = (5**0.5 - 1) / 2


def tokens_to_generate(workload: Workload) -> float:
    """Tokens that all rows of the job generate together."""
    lengths = workload.lengths or ((workload.prompt_len, workload.gen_len, 1),)
    rows = workload.num_requests or 0
    return rows * sum(n * count for _, n, count in lengths) / sum(count for *_, count in lengths)


def shuffled_rows(workload: Workload, seed: int) -> Iterator[tuple[int, int]]:
    """All rows of the job, in an order that depends on the seed alone; endless where all rows are alike.

    A histogram of a sample is stretched to ``num_requests`` rows by largest remainder. A histogram knows no order, so a
    real file's rows come in another one.
    """
    if not workload.lengths:
        return repeat((workload.prompt_len, workload.gen_len))
    counted = sum(count for _, _, count in workload.lengths)
    wanted = workload.num_requests or counted
    exact = [count * wanted / counted for _, _, count in workload.lengths]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_remainder[: wanted - sum(counts)]:
        counts[place] += 1
    rows = [(s, n) for (s, n, _), count in zip(workload.lengths, counts, strict=True) for _ in range(count)]
    random.Random(seed).shuffle(rows)
    return iter(rows)


def typical_rows(workload: Workload, seed: int, *, mixed_evenly: bool) -> Iterator[tuple[int, int]]:
    """Endless rows of the histogram's lengths.

    Args:
        mixed_evenly: any stretch has the histogram's mix as nearly as its length allows, so that a short one stands for
            a long one; else rows are drawn at random, so that how long the longest of a block is stays a matter of luck.
    """
    if not workload.lengths:
        yield from repeat((workload.prompt_len, workload.gen_len))
    ends = list(accumulate(count for _, _, count in workload.lengths))
    rng = random.Random(seed)
    at = rng.random()
    while True:
        at = (at + _GOLDEN) % 1.0 if mixed_evenly else rng.random()
        s, n, _ = workload.lengths[bisect_right(ends, at * ends[-1])]
        yield s, n
