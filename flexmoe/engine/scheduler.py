"""Rows with their token ids and their KV: carries out what `policies.admission.admission` decides from lengths alone.

A row's restart state is its token ids: preempted, it re-enters as one run of prompt + tokens. Rows of one prompt share its
full pages: the first computes them, and the others are forked from there, so that none is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexmoe.kv.batch import Run
from flexmoe.kv.cache import KVCache, KVExhausted, RowKV
from flexmoe.params import EngineRequest
from policies.admission.admission import Admission
from policies.admission.row_state import Prefix, RowLengths
from policies.admission.shared_prefix import share
from policies.placement import TIERS
from policies.policy import Policy


class Row(RowLengths):
    """A row in the engine: one completion of a request.

    Args:
        request: what was asked.
        tokens: prompt and generated token ids; generated ones are added as they come.
        limit: length at which the row ends, prompt included.

    Attributes:
        kv: its cache while in flight.
        prefix: the beginning of the prompt that it computes for others, or will begin after.
    """

    __slots__ = ("kv", "request", "tokens")
    prefix: SharedPrompt | None

    def __init__(self, request: EngineRequest, tokens: list[int], limit: int):
        prompt = len(request.prompt_token_ids)
        super().__init__(prompt=prompt, limit=limit, generated=len(tokens) - prompt)
        self.request, self.tokens = request, tokens
        self.kv: RowKV | None = None

    @property
    def generated_ids(self) -> list[int]:
        """Token ids generated so far."""
        return self.tokens[self.prompt :]

    def held_kv(self) -> RowKV:
        """Its cache.

        Raises:
            RuntimeError: it waits, and so it has none.
        """
        if self.kv is None:
            raise RuntimeError("a row that waits holds no KV")
        return self.kv

    def next_run(self) -> Run:
        """What it contributes to the sweep that has been planned."""
        cached, known = self.cached, self.tokens
        tokens = known[cached : cached + self.run]
        return Run(self.held_kv(), tokens, self.mode, int(self.logits), self, len(known))


@dataclass(slots=True, kw_only=True, eq=False)
class SharedPrompt(Prefix[Row]):
    """A prefix with its KV, once that is computed and while rows still wait for it."""

    kv: RowKV | None = None


class Scheduler:
    """Plans each sweep: reserves in the KV cache what admission has decided, and makes the runs.

    Args:
        policy: block size, pace, shares, rolling or static.
        cache: the KV pools; empty now, and from now on only these rows hold KV in them.
        expected_end: length that a row is expected to reach; default its limit. A row that outgrows it may find its
            tier full; then the youngest row of the tier is preempted.
        recompute_past: length beyond which a row's KV is computed anew (`ModelArch.rope_switch`).
    """

    def __init__(
        self,
        policy: Policy,
        cache: KVCache,
        expected_end: Callable[[Row], int] | None = None,
        recompute_past: int | None = None,
    ):
        self._cache, self._recompute_past = cache, recompute_past
        self._behind = 0
        self.admission: Admission[Row] = Admission(
            policy,
            pages={tier: cache.total(tier) for tier in TIERS},
            tails=cache.free_tails,
            layout=cache.layout,
            expected_end=expected_end,
            recompute_past=recompute_past,
        )

    @property
    def waiting(self) -> deque[Row]:
        """Rows that are not in flight, the next to enter first."""
        return self.admission.waiting

    @property
    def running(self) -> list[Row]:
        """The rows in flight, the oldest first."""
        return self.admission.running

    @property
    def unfinished(self) -> int:
        """How many rows wait or are in flight."""
        return self.admission.unfinished

    @property
    def rows_waiting(self) -> int:
        """How many rows wait, those included whose prompt is still to be computed by another one."""
        return len(self.waiting) + self._behind

    @property
    def restarts(self) -> int:
        """Rows preempted so far."""
        return self.admission.restarts

    def submit(self, rows: Sequence[Row], *, urgent: bool = False) -> None:
        """Queue the rows of one prompt: the first computes it, and the others enter when that is done.

        Args:
            urgent: they enter the next sweep, before all rows that are not (`RowLengths.urgent`).
        """
        queued = share(rows, self._cache.layout, self._recompute_past, SharedPrompt)
        self._behind += len(rows) - len(queued)
        if not urgent:
            self.waiting.extend(queued)
            return
        for row in rows:
            row.urgent = True
        first = next((at for at, row in enumerate(self.waiting) if not row.urgent), len(self.waiting))
        for at, row in enumerate(queued, first):
            self.waiting.insert(at, row)

    def plan_sweep(self) -> list[Run]:
        """Choose the runs of the next sweep and reserve their KV.

        Raises:
            RuntimeError: the cache has less room than admission counts.
        """
        rows = self.admission.plan_sweep()
        for row in self.admission.preempted:
            self._close(row)
        for row in rows:
            if row.kv is None and row.shares and row.prefix is not None and row.prefix.kv is not None:
                row.kv = self._cache.fork(row.prefix.kv)
        self._close_prefixes()  # what they held is counted as free already
        for row in rows:
            if row.kv is None or row.run > 1 or row.cached % self._cache.page_tokens == 0:
                self._reserve(row, row.run)
        return [row.next_run() for row in rows]

    def commit(self, row: Row, token: int | None) -> int:
        """The row's run is in the cache; ``token`` is what it generated, None while its prompt is unfinished.

        Returns:
            int: prompt tokens computed for the first time.
        """
        if token is not None:
            row.tokens.append(token)
        first_computed = self.admission.commit(row, generated=token is not None)
        kv, prefix = row.held_kv(), row.prefix
        self._cache.advance(kv, row.cached)
        if prefix is not None and row.shares and prefix.tier and prefix.kv is None:
            prefix.kv = self._cache.share(kv, prefix.tokens)
            self._behind -= len(prefix.waiting)
        return first_computed

    def end_sweep(self) -> None:
        """The sweep is over: the projections advance by one sweep."""
        self.admission.end_sweep()

    def finish(self, row: Row) -> None:
        """The row is done: its place and its KV are free. A static block takes no more rows then."""
        self.admission.finish(row)
        self._close(row)
        self._close_prefixes()

    def drop(self, row: Row) -> None:
        """Remove a row, whether it is in flight, waits, or waits for its prompt to be computed. Who drops the row that
        computes a prompt has to drop those that wait for it too."""
        prefix = row.prefix
        if prefix is not None and not row.shares and row not in prefix.waiting:
            self._behind -= len(prefix.waiting)  # they are dropped too: nobody computes their prompt now
        if row.tier:
            self.finish(row)
        elif row in self.waiting:
            self.admission.drop(row)
            self._close_prefixes()

    def clear(self) -> None:
        """Drop every row."""
        for row in [*self.running, *self.waiting]:
            self.drop(row)

    def preempt(self, row: Row) -> None:
        """Take a row out of flight; it re-enters first, as one run of all its tokens."""
        self.admission.preempt(row)
        self._close(row)
        self._close_prefixes()

    def shrink(self, *, restart: bool = False) -> int | None:
        """Have fewer rows in flight from now on, three quarters of those that are now; the youngest wait again.

        Args:
            restart: all others enter anew, too: a sweep has failed, and what it has written is lost.

        Returns:
            int | None: how many may be in flight; None where no fewer are possible, and nothing has changed then.
        """
        running = self.running
        if len(running) <= 1:
            return None
        self.admission.most_rows = most = len(running) * 3 // 4
        for row in reversed(running[0 if restart else most :]):
            self.preempt(row)
        return most

    def enter_aged(self, row: Row) -> None:
        """Put a row in flight as if all its tokens but the last were in the cache; its KV is whatever the pages hold.

        For benchmarks of the steady state, in which rows of all ages are in flight.

        Raises:
            KVExhausted: no tier has room for the row's future.
        """
        if not self.admission.enter_aged(row):
            raise KVExhausted
        row.kv = self._cache.open_aged(row.tier, row.cached)

    def _reserve(self, row: Row, tokens: int) -> None:
        """Give the row in the cache what admission has counted for it."""
        try:
            if row.kv is None:
                row.kv = self._cache.open(row.tier)
            self._cache.reserve(row.kv, tokens)
        except KVExhausted as e:
            raise RuntimeError(
                f"admission counts {row.pages} pages of the {row.tier} tier for a row, and the KV cache, with "
                f"{self._cache.free(row.tier)} free pages and {self._cache.free_tails} free tails, refuses them: "
                "someone else holds KV of this cache"
            ) from e

    def _close(self, row: Row) -> None:
        self._cache.close(row.held_kv())
        row.kv = None

    def _close_prefixes(self) -> None:
        closed = self.admission.prefixes.closed
        while closed:
            prefix = closed.pop()
            if isinstance(prefix, SharedPrompt) and prefix.kv is not None:
                self._cache.close(prefix.kv)
                prefix.kv = None
