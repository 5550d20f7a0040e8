"""The rows of a job in the order in which they wait: (prompt tokens, generated tokens) of each."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, chain, islice, repeat
from math import ceil, floor, isqrt
from statistics import fmean

from policies.admission.order import WINDOW_BLOCKS, longest_first
from policies.workload import Workload

#: (prompt tokens, generated tokens) of a row.
Row = tuple[int, int]
#: (prompt tokens, generated tokens, rows that are so long).
Bundle = tuple[int, int, int]

#: Bundles of a job that is followed, about; and of static blocks, which close with the first end and so may be far smaller
#: than the policy says.
BUNDLES, STATIC_BUNDLES = 160, 1500
#: The rows of the largest bundles, over those of a mean one; and how far apart the completions of a bundle may be, over
#: the part that makes so many bundles of completions from 1 to e tokens.
_LARGER, _APART = 1.5, 12.0
#: Long rows of which so many are expected near the end of a job are taken to be there.
_LIKELY = 0.5
#: The golden ratio: its multiples, taken modulo 1, fill the unit interval evenly, however many are taken.
_GOLDEN = (5**0.5 - 1) / 2


def row_length(row: Row) -> tuple[int, int]:
    """What `policies.admission.order` compares."""
    return row[1], row[0]


def tokens_to_generate(workload: Workload) -> float:
    """Tokens that all rows of the job generate together."""
    lengths = workload.lengths or ((workload.prompt_len, workload.gen_len, 1),)
    rows = workload.num_requests or 0
    return rows * sum(n * count for _, n, count in lengths) / sum(count for *_, count in lengths)


def shuffled_rows(workload: Workload, seed: int) -> Iterator[tuple[int, int]]:
    """All rows of the job, in an order that depends on the seed alone; endless where all rows are alike.

    A histogram of a sample is stretched to ``num_requests`` rows. A histogram knows no order, so a real file's rows come
    in another one.
    """
    if not workload.lengths:
        return repeat((workload.prompt_len, workload.gen_len))
    rows = _mix(workload, workload.num_requests or sum(count for _, _, count in workload.lengths))
    random.Random(seed).shuffle(rows)
    return iter(rows)


def waiting_rows(workload: Workload, window: int, seed: int) -> Iterator[Row]:
    """`shuffled_rows` in the order in which the runtime lets them wait."""
    return chain.from_iterable(waiting_prompts(workload, window, seed))


def waiting_prompts(workload: Workload, window: int, seed: int) -> Iterator[Sequence[Row]]:
    """The rows of each prompt, in the order in which the runtime lets the prompts wait.

    Args:
        window: prompts of which those that generate most wait first.
    """
    rows = shuffled_rows(workload, seed)
    if workload.rows_per_prompt == 1:
        return ((row,) for row in longest_first(rows, row_length, window))
    prompts = list(by_prompt(iter(sorted(rows)), workload.rows_per_prompt))  # a prompt's rows are alike
    random.Random(seed).shuffle(prompts)
    return longest_first(prompts, lambda prompt: row_length(prompt[0]), window)


def by_prompt(rows: Iterator[Row], rows_per_prompt: float) -> Iterator[Sequence[Row]]:
    """Neighbouring rows together, as many as make that mean."""
    sizes = prompt_sizes(rows_per_prompt)
    while prompt := tuple(islice(rows, next(sizes))):
        yield prompt


def prompt_sizes(rows_per_prompt: float) -> Iterator[int]:
    """Whole numbers of rows, without end, that make that mean."""
    before, reached = 0, rows_per_prompt
    while True:
        yield floor(reached) - before
        before, reached = floor(reached), reached + rows_per_prompt


@lru_cache(maxsize=256)
def followed_rows(workload: Workload, window: int, most: int = BUNDLES) -> tuple[tuple[Bundle, ...], int]:
    """The rows of a job, or of its first windows where all of it would be too many, as they wait, like ones as a bundle.

    Args:
        window: rows of which those that generate most wait first.
        most: bundles, about.

    Returns:
        tuple: the bundles, and how many windows they fill beside the last, partial one; 0 where they are all rows of the job.
    """
    total = workload.num_requests
    if total is not None and total <= max(window, most):
        if total <= most:
            return tuple((s, n, 1) for s, n in waiting_rows(workload, window, 0)), 0
        return _bundled(_mix(workload, total), most), 0
    full = most if total is None else (total - 1) // window
    last = 0 if total is None else total - full * window
    if 2 * window <= most:  # so few that it matters which rows meet
        windows = most // window
        rows = list(waiting_rows(replace(workload, num_requests=windows * window + last), window, 0))
        ending = _ending(rows[windows * window :], workload, window)
        return tuple((s, n, 1) for s, n in (*rows[: windows * window], *ending)), windows
    sizes = [window] * min(2, full) + [last] * bool(last)
    if full > 2:
        parts = [_mix(workload, size) for size in sizes]
        parts[2:] = [_ending(part, workload, window) for part in parts[2:]]
    else:  # every row has its window, so that none of the few longest is rounded away
        shuffled = shuffled_rows(workload, 0)
        parts = [list(islice(shuffled, size)) for size in sizes]
    return tuple(chain.from_iterable(_bundled(part, most // 2) for part in parts)), 2 if full > 2 else 0


def _ending(rows: Sequence[Row], workload: Workload, window: int) -> list[Row]:
    """The last rows of a job, with one that is in flight when all others have ended, where these have none so long.

    Of few long rows a window has none, and the job has one near its end as often as not: a row that generates n tokens outlasts
    the job if it enters in the last n sweeps.
    """
    rows = sorted(rows, key=row_length, reverse=True)
    total, counted = workload.num_requests or 0, sum(count for *_, count in workload.lengths)
    if not rows or not counted:
        return rows
    sweeps, expected = WINDOW_BLOCKS * total / window * workload.gen_len, 0.0
    for s, n, count in sorted(workload.lengths, key=lambda each: each[:2][::-1], reverse=True):
        expected += total * count / counted * min(1.0, n / sweeps)
        if expected >= _LIKELY:
            return [max(rows[0], (s, n), key=row_length), *rows[1:]]
    return rows


def _mix(workload: Workload, wanted: int) -> list[Row]:
    """So many rows of the histogram's mix."""
    return [(s, n) for s, n, count in _stretched(workload, wanted) for _ in range(count)]


def _bundled(rows: Sequence[Row], most: int) -> tuple[Bundle, ...]:
    """The rows, the longest first, in about ``most`` bundles.

    Each eighth, about a block where it is a window, is bundled by itself, as a block ends with its last row. Rows of a bundle
    generate nearly as many tokens each: what is in flight when most have ended matters row by row.
    """
    rows, wanted = sorted(rows, key=row_length, reverse=True), len(rows)
    part, size, alike = ceil(wanted / WINDOW_BLOCKS), ceil(_LARGER * wanted / most), 1 - _APART / most
    found, first = list[Bundle](), 0
    for at in range(1, wanted + 1):
        if at == wanted or at % part == 0 or at - first == size or rows[at][1] < alike * rows[first][1]:
            found.append((_mean(s for s, _ in rows[first:at]), _mean(n for _, n in rows[first:at]), at - first))
            first = at
    return tuple(found)


def _mean(lengths: Iterable[int]) -> int:
    return max(1, round(fmean(lengths)))


def _stretched(workload: Workload, wanted: int) -> list[tuple[int, int, int]]:
    """The histogram with ``wanted`` rows: each stretch of it keeps its share, in slices of like prompts by completion."""
    total = sum(count for _, _, count in workload.lengths)
    slices, before = max(1, isqrt(min(wanted, total))), 0
    ordered = []
    for s, n, count in sorted(workload.lengths):
        place = slices * before // total
        ordered.append((place, n if place % 2 else -n, s, n, count))
        before += count
    found, reached, end = [], 0, 0
    for _, _, s, n, count in sorted(ordered):
        end += count
        share = (2 * wanted * end + total) // (2 * total)
        found.append((s, n, share - reached))
        reached = share
    return found


def typical_rows(workload: Workload, seed: int) -> Iterator[tuple[int, int]]:
    """Endless rows of the histogram's lengths; any stretch has its mix as nearly as a stretch so long can."""
    if not workload.lengths:
        yield from repeat((workload.prompt_len, workload.gen_len))
    ends = list(accumulate(count for _, _, count in workload.lengths))
    at = random.Random(seed).random()
    while True:
        at = (at + _GOLDEN) % 1.0
        s, n, _ = workload.lengths[bisect_right(ends, at * ends[-1])]
        yield s, n
