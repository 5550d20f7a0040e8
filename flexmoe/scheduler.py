"""Rows: who is in flight, who enters next, who leaves. Knows lengths and blocks, not tensors.

Admission is paced (at most ``prefill_tokens`` prompt tokens a sweep, because rows that enter together leave together
and cost their full length) and looks ahead (a row enters a tier when the projected peak of all its rows fits). A row's
restart state is its token ids: sent back, it re-enters as one run of prompt + tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from flexmoe.block import Run
from flexmoe.kv_cache import KVCache, KVExhausted, RowKV
from flexmoe.params import EngineRequest
from flexmoe.projection import Projection, growth
from policies.placement import TIERS
from policies.policy import Policy


@dataclass(slots=True, eq=False)
class Row:
    """A request in the engine.

    Attributes:
        tokens: prompt and generated token ids.
        limit: length at which the row ends, prompt included.
        kv: its cache while in flight.
        mode: how it is attended while in flight.
        run: tokens of its run in the sweep under way.
        prompt_done: prompt tokens that have been computed at least once; a restart does not count them again.
    """

    request: EngineRequest
    tokens: list[int]
    limit: int
    kv: RowKV | None = None
    mode: str = ""
    run: int = 0
    prompt_done: int = 0

    @property
    def generated(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[len(self.request.prompt_token_ids) :]


class Scheduler:
    """Decides each sweep's runs.

    Args:
        policy: block size, pace, shares, rolling or static.
        cache: the KV pools.
        expected_end: length that a row is expected to reach; default its limit. A row that outgrows it may make a
            projection fail; then the youngest row of the tier is sent back.
    """

    def __init__(self, policy: Policy, cache: KVCache, expected_end: Callable[[Row], int] | None = None):
        self._policy, self._cache = policy, cache
        self._expected_end = expected_end or (lambda row: row.limit)
        self._projections = {tier: Projection(cache.total(tier)) for tier in TIERS}
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.restarts = 0
        self._block_open = True

    def largest_row_tokens(self) -> int:
        """Tokens of the longest row that an empty tier can hold."""
        return max(self._cache.total(tier) for tier in TIERS) * self._cache.block_tokens

    def plan(self) -> list[Run]:
        """Choose the runs of the next sweep and reserve their KV."""
        budget = self._policy.prefill_tokens
        for row in list(self.running):
            if row.kv is None:
                continue  # sent back while an older row was served
            budget -= self._give_run(row, budget)
        self._admit(budget)
        return [self._as_run(row) for row in self.running if row.run]

    def commit(self, row: Row, token: int | None) -> int:
        """The row's run is in the cache; ``token`` is what it generated, None while its prompt is unfinished.

        Returns:
            int: prompt tokens computed for the first time.
        """
        row.kv.length += row.run
        row.run = 0
        if token is not None:
            row.tokens.append(token)
        before = row.prompt_done
        row.prompt_done = max(before, min(row.kv.length, len(row.request.prompt_token_ids)))
        return row.prompt_done - before

    def end_sweep(self) -> None:
        """The sweep is over: the projections move on."""
        for projection in self._projections.values():
            projection.advance()

    def finish(self, row: Row) -> None:
        """The row is done: its place and its KV are free. A static block takes no more rows then."""
        self._leave(row)
        self._block_open = False

    def send_back(self, row: Row) -> None:
        """Take a row out of flight; it re-enters first, as one run of all its tokens."""
        self._leave(row)
        self.restarts += 1
        self.waiting.appendleft(row)

    def enter_aged(self, row: Row) -> None:
        """Put a row in flight as if all its tokens but the last were in the cache; its KV is whatever the blocks hold.

        A benchmark's way into the steady state, where rows of all ages are in flight.

        Raises:
            KVExhausted: no tier has room for the row's future.
        """
        cached = len(row.tokens) - 1
        curve = self._curve(row, len(row.tokens))
        tier = self._choose_tier(curve)
        if tier is None:
            raise KVExhausted
        self._enter(row, tier, curve)
        self._cache.reserve(row.kv, cached)
        row.kv.length = cached
        row.prompt_done = min(cached, len(row.request.prompt_token_ids))

    def _leave(self, row: Row) -> None:
        self._projections[row.kv.tier].remove(row)
        self._cache.close(row.kv)
        self.running.remove(row)
        row.kv, row.run = None, 0

    def _give_run(self, row: Row, budget: int) -> int:
        """Give a row in flight its run; returns the prompt tokens it takes of the sweep's budget."""
        left = len(row.tokens) - row.kv.length
        decodes = left == 1 and bool(row.generated)  # the last token of a prompt's last chunk is a prompt token still
        run = 1 if decodes else min(left, budget)
        if run == 0:
            return 0
        while row.kv is not None:
            try:
                self._cache.reserve(row.kv, run)
            except KVExhausted:
                self._send_back_youngest(row.kv.tier)
                continue
            row.run = run
            return 0 if decodes else run
        return 0

    def _send_back_youngest(self, tier: str) -> None:
        self.send_back([r for r in self.running if r.kv.tier == tier][-1])

    def _admit(self, budget: int) -> None:
        if not self.running:
            self._block_open = True
        if self._policy.schedule == "static" and not self._block_open:
            return
        while self.waiting and budget > 0 and len(self.running) < self._policy.block_size:
            row = self.waiting[0]
            curve = self._curve(row, budget)
            tier = self._choose_tier(curve)
            if tier is None:
                return
            self.waiting.popleft()
            self._enter(row, tier, curve)
            budget -= self._give_run(row, budget) or 1

    def _enter(self, row: Row, tier: str, curve) -> None:
        row.kv = self._cache.open(tier)
        row.mode = self._mode(row)
        self._projections[tier].add(row, curve)
        self.running.append(row)

    def _curve(self, row: Row, budget: int):
        """The row's future if it enters now, with ``budget`` prompt tokens left in this sweep."""
        tokens = len(row.tokens)
        rest = max(0, tokens - budget)
        chunks = 1 + -(-rest // self._policy.prefill_tokens)
        # The last token a row generates never enters the cache.
        decode = max(0, max(self._expected_end(row), tokens) - tokens - 1)
        return growth(tokens, chunks, decode, self._cache.block_tokens)

    def _choose_tier(self, curve) -> str | None:
        """The tier that the policy's shares ask for, else any with room; None when the row has to wait."""
        p = self._policy
        disk = 100.0 - p.cache_gpu_percent - p.cache_cpu_percent
        share = dict(zip(TIERS, (p.cache_gpu_percent, p.cache_cpu_percent, disk)))
        held = {t: sum(1 for r in self.running if r.kv.tier == t) for t in TIERS}
        total = sum(held.values()) + 1
        for tier in sorted(TIERS, key=lambda t: held[t] - share[t] / 100 * total):
            if self._cache.total(tier) and self._projections[tier].fits(curve) and self._has_room(tier, curve[0]):
                return tier
        return None

    def _has_room(self, tier: str, blocks: int) -> bool:
        """Rows that have outgrown their expected end hold blocks that no projection knows of."""
        return self._cache.free(tier) >= blocks and (tier != "disk" or self._cache.free_tails > 0)

    def _mode(self, row: Row) -> str:
        if row.kv.tier == "gpu":
            return "gpu"
        if row.kv.tier == "disk":
            return "fetch"
        on_host = [r for r in self.running if r.kv.tier == "cpu"]
        attended = sum(r.mode == "cpu" for r in on_host)
        wanted = self._policy.cpu_attention_percent / 100 * (len(on_host) + 1)
        return "cpu" if attended + 0.5 <= wanted else "fetch"

    def _as_run(self, row: Row) -> Run:
        first, last = row.kv.length, row.kv.length + row.run
        return Run(row.kv, row.tokens[first:last], row.mode, int(last == len(row.tokens)), row)
