"""Rows with their token ids and their KV: carries out what `policies.admission.admission` decides from lengths alone.

A row's restart state is its token ids: preempted, it re-enters as one run of prompt + tokens. Rows that begin with the same
pages share them: the first computes them, and the others are forked from there. Only for rows of another tier they are copied,
once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from flexmoe.kv.batch import Run
from flexmoe.kv.cache import KVCache, KVExhausted, PageCopy, RowKV
from flexmoe.params import EngineRequest
from flexmoe.prefixes.registry import PrefixRegistry
from policies.admission.admission import Admission
from policies.admission.row_state import Prefix, RowLengths
from policies.admission.shared_prefix import count_once
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
        found_tokens: tokens that others had computed when it first entered; None before that.
    """

    __slots__ = ("found_tokens", "kv", "request", "tokens")

    def __init__(self, request: EngineRequest, tokens: list[int], limit: int):
        prompt = len(request.prompt_token_ids)
        super().__init__(prompt=prompt, limit=limit, generated=len(tokens) - prompt)
        self.request, self.tokens = request, tokens
        self.kv: RowKV | None = None
        self.found_tokens: int | None = None

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


class Scheduler:
    """Plans each sweep: reserves in the KV cache what admission has decided, and makes the runs.

    Args:
        policy: block size, pace, shares, rolling or static.
        cache: the KV pools; empty now, and from now on only these rows hold KV in them.
        expected_end: length that a row is expected to reach; default its limit. A row that outgrows it may find its
            tier full; then the youngest row of the tier is preempted.
        recompute_past: length beyond which a row's KV is computed anew (`ModelArch.rope_switch`).
        prefix_caching: rows of different requests share pages too, not only the samples of one.

    Attributes:
        saved_tokens, needed_tokens: of all rows that have entered, those whose KV was there already, and all that they had.
    """

    def __init__(
        self,
        policy: Policy,
        cache: KVCache,
        expected_end: Callable[[Row], int] | None = None,
        recompute_past: int | None = None,
        prefix_caching: bool = True,
    ):
        self._cache, self._recompute_past = cache, recompute_past
        self._prefixes = PrefixRegistry(cache.page_tokens) if prefix_caching else None
        self.saved_tokens = self.needed_tokens = 0
        self._copies: list[PageCopy] = []
        self.admission: Admission[Row] = Admission(
            policy,
            pages={tier: cache.total(tier) for tier in TIERS},
            tails=cache.free_tails,
            layout=cache.layout,
            expected_end=expected_end,
            recompute_past=recompute_past,
            most_fetched=policy.most_fetched(cache.free_tails),
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
        return self.admission.rows_waiting

    @property
    def restarts(self) -> int:
        """Rows preempted so far."""
        return self.admission.restarts

    def submit(self, rows: Sequence[Row], *, urgent: bool = False) -> None:
        """Queue the rows of one prompt: the first computes what nobody has computed, and the others enter when that is done.

        Args:
            urgent: they enter the next sweep, before all rows that are not (`RowLengths.urgent`).
        """
        if not rows:
            return
        count_once(rows)
        for row in rows:
            row.urgent = urgent
        prompt, ends = rows[0].tokens[: rows[0].prompt], [len(rows[0].tokens)] if len(rows) > 1 else []
        known = self._prefixes
        if known is None:
            known = PrefixRegistry(self._cache.page_tokens)
        else:
            ends += rows[0].request.prefix_ends
        if ends:
            past = [row.is_past(self._recompute_past) for row in rows]
            found: dict[bool, Prefix[Row] | None] = {each: known.find(prompt, ends, each) for each in sorted(set(past))}
            for row, each in zip(rows, past):
                row.prefix = found[each]
        self.admission.submit(rows)

    def prefix_metrics(self) -> dict[str, float]:
        """Tokens that rows had to have in the cache when they entered, those of them that others had computed, and their share."""
        needed, saved = self.needed_tokens, self.saved_tokens
        return {"needed_tokens": needed, "saved_tokens": saved, "hit_rate": saved / needed if needed else 0.0}

    def plan_sweep(self) -> list[Run]:
        """Choose the runs of the next sweep and reserve their KV. Before it runs the pages of `take_copies` have to be copied.

        Raises:
            RuntimeError: the cache has less room than admission counts.
        """
        rows = self.admission.plan_sweep()
        for row in self.admission.preempted:
            self._close(row)
        self._change_prefixes()
        for row in rows:
            if row.kv is None:
                self._begin(row)
        for row in rows:
            if row.kv is None or row.run > 1 or row.cached % self._cache.page_tokens == 0:
                self._reserve(row, row.run)
        return [row.next_run() for row in rows]

    def take_copies(self) -> list[PageCopy]:
        """What the rows of the sweep that has been planned need from other tiers, in the order in which it has to be copied."""
        copies, self._copies = self._copies, []
        return copies

    def commit(self, row: Row, token: int | None) -> int:
        """The row's run is in the cache; ``token`` is what it generated, None while its prompt is unfinished.

        Returns:
            int: prompt tokens that are stored for the first time, those that other rows have computed included.
        """
        if token is not None:
            row.tokens.append(token)
        first_computed = self.admission.commit(row, generated=token is not None)
        kv = row.held_kv()
        self._cache.advance(kv, row.cached)
        opened = self.admission.prefixes.opened
        for _, pages in opened:
            pages.kv = self._cache.share(kv, pages.prefix.tokens)
        opened.clear()
        return first_computed

    def end_sweep(self) -> None:
        """The sweep is over: the projections advance by one sweep."""
        self.admission.end_sweep()

    def finish(self, row: Row) -> None:
        """The row is done: its place and its KV are free. A static block takes no more rows then."""
        self.admission.finish(row)
        self._close(row)
        self._change_prefixes()

    def drop(self, row: Row) -> None:
        """Remove a row, whether it is in flight, waits, or waits for its beginning to be computed; one that has ended stays so."""
        if row.tier:
            self.finish(row)
        elif self.admission.drop(row):
            self._change_prefixes()

    def clear(self) -> None:
        """Drop every row."""
        for row in [*self.running, *self.admission.aside, *self.waiting]:
            self.drop(row)

    def preempt(self, row: Row) -> None:
        """Take a row out of flight; it re-enters first, as one run of all its tokens."""
        self.admission.preempt(row)
        self._close(row)
        self._change_prefixes()

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
            raise RuntimeError(self._refused(row.pages, row.tier, "row")) from e

    def _refused(self, pages: int, tier: str, what: str) -> str:
        return (
            f"admission counts {pages} pages of the {tier} tier for a {what}, and the KV cache, with "
            f"{self._cache.free(tier)} free pages and {self._cache.free_tails} free tails, refuses them: "
            "someone else holds KV of this cache"
        )

    def _close(self, row: Row) -> None:
        self._cache.close(row.held_kv())
        row.kv = None

    def _begin(self, row: Row) -> None:
        """The row enters: after the pages that it shares, where there are any."""
        if row.held is not None:
            row.kv = self._cache.fork(row.held.kv)
        self.saved_tokens += row.cached
        self.needed_tokens += row.length
        if row.found_tokens is None:
            row.found_tokens = row.cached

    def _change_prefixes(self) -> None:
        """Copy and close pages of prefixes as admission has counted it, in its order: then there is room for each copy, and its
        room is nobody's that is still to be copied."""
        changes = self.admission.prefixes.changes
        for pages, source in changes:
            if source is None:
                self._cache.close(pages.kv)
                continue
            above = None if pages.above is None else pages.above.kv
            try:
                pages.kv, copy = self._cache.copy_shared(source.kv, pages.tier, above)
            except KVExhausted as e:
                raise RuntimeError(self._refused(pages.pages, pages.tier, "prefix")) from e
            self._copies.append(copy)
        changes.clear()
