"""Rows of many lengths on their way through the admission, from event to event: what each stretch of sweeps has to do.

How many rows are in flight when their lengths differ is not given by a mean: a long row waits until it fits beside the
others, those behind it wait too, and a static block ends with its longest row. So such a job is followed as
`policies.admission` treats it, but not sweep by sweep: between two events, rows that enter and rows that end, all sweeps
are alike. Rows of like length that follow each other enter together. KV is counted
over all tiers together.

The row that gets its first token in sweep t0 attends over s + t - t0 tokens in a later sweep t, and holds as many; its last
sweep is t0 + n - 1. So a group of rows is (end, base, rows), and each of its rows holds base + t.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from math import ceil, inf

from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.timing.job_rows import Bundle
from policies.admission.kv_pages import KVPages
from policies.admission.shared_prefix import shared_tokens

#: Ends may lie between two sweeps, where a group entered over several; they count to the nearer one.
_WITHIN = 0.5
_ROUNDING = 1e-6
_ALL_SEE_ALL = KVPages(page_tokens=PAGE_TOKENS)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Sweeps that are alike; counts are of a mean sweep.

    Attributes:
        sweeps: how many.
        decode_rows, decode_context: rows that decode; tokens that they attend over.
        prompt_tokens, prompt_rows, prompt_past, pairs: as in `cost_model.timing.sweep_load.RowGroup`.
        entered: rows whose prompt is complete; they get their first token.
        waiting: rows waited when it began.
        fresh: no row has ended since the block was empty.
        block: how often the block had been empty.
    """

    sweeps: float
    decode_rows: float
    decode_context: float
    prompt_tokens: float
    prompt_rows: float
    prompt_past: float
    pairs: float
    entered: float
    waiting: bool
    fresh: bool
    block: int

    @property
    def rows(self) -> float:
        """In flight."""
        return self.decode_rows + self.prompt_rows

    @property
    def tokens(self) -> float:
        """Generated in all its sweeps."""
        return self.sweeps * (self.decode_rows + self.entered)


def flow(
    rows: Iterable[Bundle],
    *,
    block: int,
    pace: int,
    room: int,
    static: bool,
    layout: KVPages = _ALL_SEE_ALL,
    rows_per_prompt: float = 1.0,
    prefix: tuple[int, float] = (0, 1.0),
    held_share: float = 1.0,
) -> list[Stretch]:
    """The stretches of a job.

    Args:
        rows: of the job, in the order in which they wait.
        block: rows that may be in flight.
        pace: prompt tokens that may enter a sweep.
        room: pages of the KV cache. A row that is larger runs alone.
        layout: pages of a row; default: all layers see all tokens.
        static: from the end of a row, or from when one has found no room, to the end of the last one in flight, none enters.
        rows_per_prompt: of so many rows one computes the pages of a prompt, and the others begin after them.
        prefix: tokens that prompts have in common, and of how many prompts one computes them.
        held_share: part of a row's pages that does not count as another row's.
    """
    common = _Common(1 / rows_per_prompt, prefix[0], 1 / prefix[1])
    job = _Flow(list(rows), block, pace, room, static, layout, common, held_share)
    job.run()
    return job.stretches


@dataclass(frozen=True, slots=True)
class _Common:
    """What rows find that others have computed.

    Attributes:
        computing: part of the rows that compute their prompt's pages; the others begin after them.
        prefix: tokens that prompts have in common.
        first: of the computing rows, the part that computes those too.
    """

    computing: float
    prefix: int
    first: float

    def parts(self, s: int) -> tuple[tuple[float, int], ...]:
        """(part of the rows, tokens that they begin after) of prompts of ``s`` tokens."""
        whole = shared_tokens(s, PAGE_TOKENS)
        begun = min(self.prefix, whole)
        return (
            (self.computing * self.first, 0),
            (self.computing * (1 - self.first), begun),
            (1 - self.computing, whole),
        )


class _PagesHeld(dict[int, float]):
    """Pages of a row of so many tokens, those left out that count as another row's."""

    def __init__(self, layout: KVPages, share: float):
        super().__init__()
        self._layout, self._share = layout, share

    def __missing__(self, tokens: int) -> float:
        self[tokens] = pages = max(1.0, self._layout.held(tokens) * self._share)
        return pages


_pages_held = lru_cache(maxsize=16)(_PagesHeld)


class _Flow:
    def __init__(
        self,
        rows: list[Bundle],
        block: int,
        pace: int,
        room: int,
        static: bool,
        layout: KVPages,
        common: _Common,
        held_share: float,
    ):
        self.stretches: list[Stretch] = []
        self._layout, self._parts = layout, cache(common.parts)
        self._pages = _pages_held(layout, held_share)
        self._own_tokens = cache(self._computed_tokens)
        self._queue, self._block, self._pace, self._room, self._static = rows[::-1], block, pace, room, static
        # Groups by their end, and the pages that all in flight will hold then, unless there is room for any that may be.
        self._running: list[tuple[float, float, float]] = []
        self._used: list[float] = []
        most = sorted(chain.from_iterable([self._pages[s + n - 1]] * min(count, block) for s, n, count in rows))
        self._ample = sum(most[-block:]) <= room
        self._at, self._budget = 0, float(pace)
        self._closed, self._fresh, self._blocks = False, True, 0
        self._rows = self._base = 0.0  # of what decodes
        self._new_rows = self._new_base = 0.0  # of what decodes from the next sweep on
        self._tokens = self._chunks = self._past = self._pairs = self._entered = (
            0.0  # of the sweep that is being filled
        )

    def run(self) -> None:
        while self._queue or self._running:
            waits = self._admit()
            if self._tokens or not waits:
                waits = not self._end_sweep() and waits
            if waits and self._running:
                until = min(self._running[0][0] + _WITHIN, self._fits_at - 1)
                self._pass(max(1, int(until - self._at) + 1))

    def _admit(self) -> bool:
        """Let rows enter. Whether nothing more can until a row ends."""
        self._fits_at = inf
        if not self._running:
            self._closed, self._fresh, self._blocks = False, True, self._blocks + 1
        while self._queue and self._budget > 0:
            if self._closed:
                return True
            s, n, count = self._queue[-1]
            most = min(count, int(self._block - self._rows - self._new_rows + _ROUNDING))
            if most > 0:
                most = self._fitting(s, n, most)
            if most <= 0 and self._running:
                self._closed = self._static
                return True
            self._fits_at = inf
            entered = self._enter(s, n, max(1, most))
            if entered == count:
                self._queue.pop()
            else:
                self._queue[-1] = (s, n, count - entered)
        return not self._queue and self._budget > 0

    def _fitting(self, s: int, n: int, most: int) -> int:
        """How many rows may enter with all that are in flight fitting until their ends: usage is highest at an end."""
        if self._ample:
            return most
        at, room, running, pages = self._at, self._room, self._running, self._pages
        own = at + n - 1
        free, needed = room - self._used_at(own), pages[s + n - 1]
        found, self._fits_at = min(float(most), free / needed), float(at)
        if free < needed:  # perhaps when it ends after the next of those that end no earlier
            later = bisect_left(running, (own,))
            self._fits_at = running[later][0] - n + 2 if later < len(running) else inf
        held = s - at
        for (end, _, _), used in zip(running, self._used):
            if end > own:
                break
            fits = (room - used) / pages[ceil(held + end)]
            if fits < found:
                found = fits
                if fits < 1:
                    self._fits_at = max(self._fits_at, s + end - self._layout.longest_row(int((room - used) // 1), 1))
        return int(found + _ROUNDING)

    def _used_at(self, sweep: float) -> float:
        """Pages of those in flight that have not ended before."""
        later, pages = self._running[bisect_left(self._running, (sweep,)) :], self._pages
        return sum([pages[ceil(base + sweep)] * rows for _, base, rows in later])

    def _enter(self, s: int, n: int, count: int) -> int:
        """Up to ``count`` rows enter, in this sweep or as fast as the pace allows, but not beyond the next end."""
        own = self._own_tokens(s)
        if count * own > self._budget:
            sweeps = max(0.0, self._next_end(n - 1 if self._static else inf) - self._at + _WITHIN)
            if sweeps < inf:
                count = max(1, min(count, int((self._budget + int(sweeps) * self._pace) / own)))
        if count * own > self._budget:
            self._enter_over_sweeps(s, n, count)
        else:
            self._compute(s, count * own, count)
            self._start(s, n, count, self._at, count)
        return count

    def _next_end(self, own: float) -> float:
        """When the next row ends, or a row that lives for so many more sweeps."""
        return min(self._running[0][0] if self._running else inf, self._at + own)

    def _enter_over_sweeps(self, s: int, n: int, count: int) -> None:
        """Rows that this sweep has no room for enter one after the other; those that were first decode meanwhile."""
        begin, prompt = self._at, self._own_tokens(s)
        left = count * prompt - self._budget
        more = ceil(left / self._pace)
        last = left - (more - 1) * self._pace
        # Where a sweep ends within a prompt, it and the next one have a piece of it.
        pieces_of_first, pieces_of_last = ceil(self._budget / prompt), ceil(last / prompt)
        self._compute(s, self._budget, pieces_of_first)
        self._end_sweep()
        each = self._pace / prompt
        own = min((count - 1) / 2, each * (n - 1))
        self._pass(more - 1, s, own, (count + more - pieces_of_first - pieces_of_last) / max(1, more - 1))
        self._compute(s, last, pieces_of_last)
        start = begin + more * (count + 1) / (2 * count)
        # Of short rows some have ended by now.
        alive = min(count, max(1.0, n * each))
        self._start(s, n, alive, max(start, self._at - n + 1), min(alive, max(1.0, self._entered)))

    def _start(self, s: int, n: int, rows: float, start: float, new: float) -> None:
        """Rows are in flight; ``new`` of them do not decode in this sweep."""
        base, end = s - start, start + n - 1
        running, used, pages = self._running, self._used, self._pages
        at = bisect_left(running, (end,))
        if not self._ample:
            own = self._used_at(end) + rows * pages[s + n - 1]
            for place in range(at):
                used[place] += rows * pages[ceil(base + running[place][0])]
            for place in range(at, len(running)):
                if running[place][0] > end:
                    break
                used[place] = own  # it ends with this one
            used.insert(at, own)
        running.insert(at, (end, base, rows))
        self._new_rows += new
        self._new_base += new * base
        self._rows += rows - new
        self._base += (rows - new) * base

    def _compute(self, s: int, tokens: float, pieces: float) -> None:
        """So many tokens of prompts of ``s`` are computed in this sweep, in so many pieces of prompts or whole ones."""
        rows = tokens / self._own_tokens(s)
        self._budget -= tokens
        self._tokens += tokens
        self._chunks += pieces
        for part, begin in self._parts(s):
            self._past += part * (pieces * begin + max(0.0, pieces - rows) * (s - begin) / 2)
            self._pairs += part * rows * (s * s - begin * begin) / 2
        self._entered += rows

    def _computed_tokens(self, s: int) -> float:
        """Prompt tokens that a row computes, on average."""
        return sum(part * (s - begin) for part, begin in self._parts(s))

    def _end_sweep(self) -> bool:
        """The sweep is full; whether rows end with it."""
        self._record(1, self._rows, self._base + self._rows * self._at)
        self._at += 1
        self._rows += self._new_rows
        self._base += self._new_base
        self._new_rows = self._new_base = 0.0
        return self._leave()

    def _pass(self, sweeps: int, s: int = 0, own: float = 0.0, pieces: float = 0.0) -> None:
        """So many sweeps pass, each full of so many pieces of prompts of ``s``, of which ``own`` rows decode by now; or without
        prompts."""
        while sweeps > 0:
            step = sweeps
            if self._running:
                step = min(sweeps, max(1, int(self._running[0][0] - self._at + _WITHIN) + 1))
            if s:
                self._compute(s, self._pace, pieces)
            middle = self._at + (step - 1) / 2
            self._record(step, self._rows + own, self._base + self._rows * middle + own * s)
            self._at += step
            sweeps -= step
            self._leave()

    def _record(self, sweeps: int, rows: float, context: float) -> None:
        prompts = (self._tokens, self._chunks, self._past, self._pairs, self._entered)
        self.stretches.append(Stretch(sweeps, rows, context, *prompts, bool(self._queue), self._fresh, self._blocks))
        self._tokens = self._chunks = self._past = self._pairs = self._entered = 0.0
        self._budget = float(self._pace)

    def _leave(self) -> bool:
        """Rows whose last sweep has passed leave; whether there are any."""
        left = 0
        for end, base, rows in self._running:
            if end >= self._at - 1 + _WITHIN:
                break
            self._rows -= rows
            self._base -= rows * base
            left += 1
        del self._running[:left], self._used[:left]
        if left:
            self._closed, self._fresh = self._static, False
        return left > 0
