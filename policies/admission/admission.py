"""Who is in flight, who enters next, who leaves, and what each row contributes to a sweep. Knows only counts.

Admission is paced (at most ``prefill_tokens`` prompt tokens a sweep, because rows that enter together leave together
and cost their full length) and looks ahead (a row enters a tier when the projected peak of all its rows fits). A row
that is preempted re-enters as one run of its prompt and what it has generated. Rows that begin alike share the
beginning's computation and its pages (`policies.admission.shared_prefix`). Urgent rows enter the next sweep, where need be in
place of the youngest others. The runtime's scheduler and the planner's simulator use this same
admission, so what is predicted is what runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Generic

from policies.admission.kv_pages import KVPages
from policies.admission.kv_projection import Projection, growth
from policies.admission.row_state import AttentionMode, PrefixPages, RowT
from policies.admission.shared_prefix import Prefixes
from policies.placement import TIERS
from policies.policy import Policy


class Admission(Generic[RowT]):
    """Decides each sweep's runs: ``plan_sweep``, then ``commit`` each row, ``finish`` those that have ended, ``end_sweep``.

    How many pages of its tier a row holds its length says (`policies.admission.kv_pages`); a row of the disk tier also holds a
    tail, the host page that it grows in.

    Args:
        policy: block size, pace, shares, rolling or static.
        pages: KV pages per tier; all three tiers are present.
        tails: rows that the disk tier can hold at once.
        layout: pages of a row.
        expected_end: length that a row is expected to reach; default its limit. A row that outgrows it may find its
            tier full; then the youngest row of the tier is preempted.
        most_fetched: rows of the host tier whose KV may be fetched at once; the CPU attends the others. None is no limit.
        recompute_past: a row that grows past this length is preempted, so that all of it is computed as one run: its
            keys are stored rotated, and beyond that length they are rotated otherwise.

    Attributes:
        waiting: rows that are not in flight, the next to enter first.
        restarts: rows preempted so far.
        preempted: rows preempted since the last `plan_sweep` began; one of them may have entered again since.
        free_tails: rows that the disk tier can still take.
        most_rows: places in the block; fewer than the policy has once memory has run short.
        prefixes: what rows share.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        pages: Mapping[str, int],
        tails: int,
        layout: KVPages,
        expected_end: Callable[[RowT], int] | None = None,
        recompute_past: int | None = None,
        most_fetched: int | None = None,
    ):
        self._policy, self._layout = policy, layout
        self._expected_end = expected_end or (lambda row: row.limit)
        self._recompute_past, self._most_fetched = recompute_past, most_fetched
        self._pages = {tier: pages[tier] for tier in TIERS}
        self._usable = [tier for tier in TIERS if pages[tier]]
        on_disk = 100.0 - policy.cache_gpu_percent - policy.cache_cpu_percent
        shares = policy.cache_gpu_percent, policy.cache_cpu_percent, on_disk
        self._share = {tier: percent / 100 for tier, percent in zip(TIERS, shares)}
        self._projections = {tier: Projection(self._pages[tier]) for tier in TIERS}
        self._free = dict(self._pages)
        self._rows = dict.fromkeys(TIERS, 0)
        self._rows_on_cpu_attention = 0
        # In the order of entry; a row leaves in constant time.
        self._running: dict[RowT, None] = {}
        self._block_open = True
        self.most_rows = policy.block_size
        self.free_tails = tails
        self.waiting: deque[RowT] = deque()
        self.restarts = 0
        self.preempted: list[RowT] = []
        self.prefixes: Prefixes[RowT] = Prefixes(self._free, self._projections, layout)

    @property
    def running(self) -> list[RowT]:
        """The rows in flight, the oldest first."""
        return list(self._running)

    @property
    def aside(self) -> list[RowT]:
        """The rows that wait outside of the queue, for what rows in flight compute."""
        made = {copy: None for row in self._running for copy in self.prefixes.made(row)}
        return [row for copy in made for row in copy.aside]

    @property
    def unfinished(self) -> int:
        """How many rows wait or are in flight."""
        return self.rows_waiting + len(self._running)

    @property
    def rows_waiting(self) -> int:
        """How many rows wait, those included whose beginning is being computed by another one."""
        return len(self.waiting) + self.prefixes.reserved_places

    def free(self, tier: str) -> int:
        """Pages of a tier that no row holds."""
        return self._free[tier]

    def held(self, tier: str) -> int:
        """Pages of a tier that rows hold."""
        return self._pages[tier] - self._free[tier]

    def projected_peak(self, tier: str) -> int:
        """The most pages of a tier that the rows in flight will hold in any sweep to come."""
        return self._projections[tier].peak

    def largest_row_tokens(self) -> int:
        """Tokens of the longest row that an empty tier can hold."""
        return self._layout.longest_row(max(self._pages.values()), self._policy.prefill_tokens)

    def submit(self, rows: Iterable[RowT]) -> None:
        """Rows join the queue, urgent ones behind the others of their kind."""
        for row in rows:
            self.waiting.insert(self._urgent_waiting() if row.urgent else len(self.waiting), row)
            self.prefixes.want(row)

    def plan_sweep(self) -> list[RowT]:
        """Choose the runs of the next sweep and take the pages they need; returns the rows that have one."""
        self.preempted = []
        budget, page_tokens = self._policy.prefill_tokens, self._layout.page_tokens
        entered = self._admit_urgent(budget) if self.waiting and self.waiting[0].urgent else {}
        budget -= sum(entered.values())
        for row in self.running:
            if row in entered:
                continue
            cached = row.cached
            if row.stale:
                self.preempt(row)
            elif row.generated and row.prompt + row.generated == cached + 1 and cached % page_tokens:
                row.run, row.logits = 1, True  # nearly every row: one token, into a page that it holds already
            elif row.tier:  # else it was preempted while an older row was served
                budget -= self._give_run(row, budget)
        self._admit(budget)
        return [row for row in self._running if row.run]

    def commit(self, row: RowT, generated: bool) -> int:
        """The row's run is in the cache; ``generated`` says whether it ended with a new token.

        Returns:
            int: prompt tokens that are stored for the first time, those that other rows have computed included.
        """
        begun = row.cached
        row.cached += row.run
        if row.run > 1 and self._layout.windowed:
            self._keep(row)
        if row.prefix is not None and begun < row.prefix.tokens:
            self._queue_next(self.prefixes.computed(row))
        row.run = 0
        row.generated += generated
        row.stale = generated and row.length - 1 == self._recompute_past
        before = row.prompt_done
        if before == row.prompt:
            return 0
        row.prompt_done = max(before, min(row.cached, row.prompt))
        return row.prompt_done - before

    def end_sweep(self) -> None:
        """The sweep is over: the projections advance by one sweep."""
        for tier in self._usable:
            self._projections[tier].advance()

    def finish(self, row: RowT) -> None:
        """The row is done: its place and its pages are free. A static block takes no more rows then, nor once one has found no
        room: it would fit later, and the block would last a row's life longer for its sake."""
        self._leave(row)
        self._block_open = False

    def drop(self, row: RowT) -> bool:
        """The row no longer waits; returns whether it did."""
        if not self.prefixes.take_back(row):
            if row not in self.waiting:
                return False
            self.waiting.remove(row)
        self.prefixes.unwant(row)
        return True

    def preempt(self, row: RowT) -> None:
        """Take a row out of flight; it re-enters first, as one run of all its tokens."""
        if row.stale:  # its keys are rotated otherwise from now on
            self._leave(row)
            row.prefix = None
        else:
            self.prefixes.want(row)  # before it leaves: what it holds stays for it
            self._leave(row)
        self.restarts += 1
        self.preempted.append(row)
        self.waiting.insert(0 if row.urgent else self._urgent_waiting(), row)

    def enter_aged(self, row: RowT) -> bool:
        """Put a row in flight as if all its tokens but the last were in the cache (benchmarks of the steady state).

        Returns:
            bool: False when no tier has room for the row's future; it has not entered then.
        """
        curve = self._curve(row, row.length)
        tier = next((tier for tier in self._tiers(row) if self._fits(tier, curve)), None)
        if tier is None:
            return False
        self._enter(row, tier, curve, None)
        row.cached = row.length - 1
        self._keep(row)
        row.prompt_done = min(row.cached, row.prompt)
        return True

    def _give_run(self, row: RowT, budget: int) -> int:
        """Give a row in flight its run; returns the prompt tokens it takes of the sweep's budget."""
        left = row.length - row.cached
        decodes = left == 1 and row.generated > 0  # the last token of a prompt's last chunk is a prompt token still
        run = 1 if decodes else min(left, budget)
        if run == 0:
            return 0
        if self._layout.windowed and (end := self.prefixes.next_end(row)) is not None:
            run = min(run, end - row.cached)  # later, layers with a window have given back pages of the prefix
        while not self._hold(row, run):
            if not self.prefixes.evict(row.tier):
                self._preempt_youngest(row.tier)
            if not row.tier:
                return 0
        row.run, row.logits = run, run == left
        return 0 if decodes else run

    def _keep(self, row: RowT) -> None:
        """The row holds the pages of what it has cached: those that only its run needed are free."""
        pages = self._layout.held(row.cached) - row.shared_pages
        self._free[row.tier] += row.pages - pages
        row.pages = pages

    def _hold(self, row: RowT, run: int) -> bool:
        """Take the pages that the row lacks for a run of so many tokens: all of them, or none and return False."""
        missing = self._layout.during(row.cached, run) - row.shared_pages - row.pages
        if missing <= 0:
            return True
        if missing > self._free[row.tier]:
            return False
        self._free[row.tier] -= missing
        row.pages += missing
        return True

    def _preempt_youngest(self, tier: str) -> None:
        self.preempt(next(row for row in reversed(self._running) if row.tier == tier))

    def _admit(self, budget: int) -> None:
        if not self._running:
            self._block_open = True
        if self._policy.schedule == "static" and not self._block_open:
            return
        while self.waiting and budget > 0 and self._has_place(self.waiting[0]):
            taken = self._enter_first(budget)
            if taken is not None:
                budget -= taken
            elif self._running or not self.prefixes.evict(keep=self.waiting[0]):
                self._block_open = not self._running
                return

    def _admit_urgent(self, budget: int) -> dict[RowT, int]:
        """Let urgent rows enter before those in flight get prompt tokens. Where there is no room for one, the youngest row that
        is not urgent leaves.

        Returns:
            dict[RowT, int]: the rows that entered, with the prompt tokens that each takes of the budget.
        """
        entered: dict[RowT, int] = {}
        while self.waiting and self.waiting[0].urgent and budget > 0:
            row = self.waiting[0]
            taken = self._enter_first(budget) if self._has_place(row) else None
            if taken is not None:
                budget -= taken
                if row.tier:
                    entered[row] = taken
                continue
            youngest = next((other for other in reversed(self._running) if not other.urgent), None)
            if youngest is not None:
                self.preempt(youngest)
            elif not self.prefixes.evict(keep=row):
                break
        return entered

    def _enter_first(self, budget: int) -> int | None:
        """Let the first row that waits enter, or put it aside where a row in flight computes what it begins with.

        Returns:
            int | None: prompt tokens that it takes of the budget; None where no tier has room for it.
        """
        row = self.waiting[0]
        awaited = self.prefixes.awaited(row)
        # An urgent row waits for another one only, since those in flight share the prompt tokens that are left.
        if awaited is not None and (not row.urgent or (awaited.maker is not None and awaited.maker.urgent)):
            self.prefixes.put_aside(self.waiting.popleft(), awaited)
            return 0
        for tier in self._tiers(row):
            begun = self.prefixes.begun(row, tier)
            curve = self._curve(row, budget, begun)
            if self._fits(tier, curve, self.prefixes.copied_pages(begun, tier)):
                self._enter(self.waiting.popleft(), tier, curve, begun)
                return self._give_run(row, budget)
        return None

    def _urgent_waiting(self) -> int:
        """How many urgent rows wait; they are the first."""
        return next((at for at, row in enumerate(self.waiting) if not row.urgent), len(self.waiting))

    def _queue_next(self, rows: Sequence[RowT]) -> None:
        """Let rows wait before all that have not begun, urgent ones before all."""
        if rows:
            urgent, others = [row for row in rows if row.urgent], [row for row in rows if not row.urgent]
            begun = list(takewhile(lambda row: row.urgent or row.prompt_done or row.generated, self.waiting))
            for _ in begun:
                self.waiting.popleft()
            self.waiting.extendleft(reversed([*urgent, *begun, *others]))

    def _has_place(self, row: RowT) -> bool:
        """Whether the block has a place for it; rows that begin a new prompt leave the reserved places free."""
        new = row.prompt_done == row.generated == 0 and self._running
        return len(self._running) + (self.prefixes.reserved_places if new else 0) < self.most_rows

    def _tiers(self, row: RowT) -> list[str]:
        """The tiers in the order in which the row is to try them: where most of its beginning is, then as the shares ask."""
        total, rows, share = len(self._running) + 1, self._rows, self._share

        def key(tier: str) -> tuple[int, float]:
            return -self.prefixes.covered(row, tier), rows[tier] - share[tier] * total

        return sorted(self._usable, key=key)

    def _curve(self, row: RowT, budget: int, begun: PrefixPages[RowT] | None = None) -> list[int]:
        """The row's future if it enters now after ``begun``, with ``budget`` prompt tokens left in this sweep."""
        tokens, cached = row.length, begun.prefix.tokens if begun else 0
        chunks = 1 + -(-max(0, tokens - cached - budget) // self._policy.prefill_tokens)
        if self._layout.windowed and row.prefix is not None:
            chunks += len(row.prefix.path)
        # The last token a row generates never enters the cache.
        decode = max(0, self._expected_end(row) - tokens - 1)
        chunk = min(max(1, tokens - cached), self._policy.prefill_tokens)
        curve = growth(tokens, chunks, decode, self._layout, chunk)
        return [pages - begun.shared_pages for pages in curve] if begun else curve

    def _fits(self, tier: str, curve: list[int], copied: int = 0) -> bool:
        """Whether a row with this future may enter, and pages that are copied for it."""
        return self._has_room(tier, curve[0] + copied) and self._projections[tier].fits(curve, copied)

    def _has_room(self, tier: str, pages: int) -> bool:
        """Rows that have outgrown their expected end hold pages that no projection knows of."""
        return self._free[tier] >= pages and (tier != "disk" or self.free_tails > 0)

    def _enter(self, row: RowT, tier: str, curve: list[int], begun: PrefixPages[RowT] | None) -> None:
        row.tier, row.mode = tier, self._mode(tier)
        self._rows[tier] += 1
        self._rows_on_cpu_attention += row.mode is AttentionMode.CPU
        self.free_tails -= tier == "disk"
        self._projections[tier].add(row, curve)
        self._running[row] = None
        self.prefixes.enter(row, begun)

    def _mode(self, tier: str) -> AttentionMode:
        if tier != "cpu":
            return AttentionMode.GPU if tier == "gpu" else AttentionMode.FETCH
        rows, attended = self._rows["cpu"], self._rows_on_cpu_attention
        if attended + 0.5 <= self._policy.cpu_attention_percent / 100 * (rows + 1):
            return AttentionMode.CPU
        full = self._most_fetched is not None and rows - attended >= self._most_fetched
        return AttentionMode.CPU if full else AttentionMode.FETCH

    def _leave(self, row: RowT) -> None:
        del self._running[row]
        self._projections[row.tier].remove(row)
        self._rows[row.tier] -= 1
        self._rows_on_cpu_attention -= row.mode is AttentionMode.CPU
        self.free_tails += row.tier == "disk"
        self._free[row.tier] += row.pages
        self._queue_next(self.prefixes.leave(row))
        row.tier, row.cached, row.pages, row.run, row.stale = "", 0, 0, 0, False
