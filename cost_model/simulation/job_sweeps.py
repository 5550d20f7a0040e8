"""The sweeps of a finite job, from the admission that the runtime uses: who enters, who leaves, what each sweep does.

A small job is followed row by row. Of a large one, rows of a like age move as one bundle, with the machine's room cut
to match, and once the job is in its steady state one period of it is followed and counted as often as it recurs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from cost_model.memory.allocation import Allocation
from cost_model.timing.job_phases import JobPhases, job_phases
from cost_model.timing.job_rows import (
    Row,
    by_prompt,
    prompt_sizes,
    row_length,
    tokens_to_generate,
    typical_rows,
    waiting_prompts,
)
from cost_model.timing.sweep_load import COPY_LANES, MODES, RowGroup, SweepLoad, copied_by_lane
from policies.admission.admission import Admission
from policies.admission.order import WINDOW_BLOCKS, longest_first
from policies.admission.row_state import AttentionMode, Prefix, RowLengths
from policies.admission.shared_prefix import share
from policies.common.errors import InfeasibleError
from policies.placement import TIERS
from policies.policy import Policy
from policies.workload import Workload

#: Rows times sweeps that are followed at most, roughly: half a second of work.
ROW_SWEEPS = 1_000_000
#: In lives of a row, what is followed of a job beside the periods of its steady state: fill, settle, the rest, drain.
_OTHER_LIVES = 4
_FEWEST_BUNDLES, _MOST_BUNDLES = 48, 160
#: Lives that the steady state is waited for, and followed, at most: rows that entered together drift apart slowly, and
#: where they differ no period is like the next.
_MOST_SETTLING, _MOST_PERIODS = 16, 24

_FIELDS = ("decode_rows", "decode_context", "prompt_rows", "prompt_tokens", "prompt_past", "pairs")
#: Place in `MODES` by home tier and mode of attention.
_MODE_OF: Mapping[tuple[str, AttentionMode | None], int] = {
    ("gpu", AttentionMode.GPU): 0,
    ("cpu", AttentionMode.FETCH): 1,
    ("disk", AttentionMode.FETCH): 2,
    ("cpu", AttentionMode.CPU): 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSweeps:
    """What each sweep of a job does, one entry per sweep that was followed.

    Attributes:
        groups: ``[sweeps, modes, fields of RowGroup]``.
        logits: rows that get a token.
        pages: KV pages in use per tier, ``[sweeps, 3]``.
        copied: pages of prefixes that are copied from tier to tier before it, ``[sweeps, lanes]`` (`COPY_LANES`).
        phase: "fill", "steady" or "drain".
        recurs: how many sweeps of the job each one stands for.
        period: (first, last + 1) of the sweeps that stand for several; equal when none does.
    """

    groups: np.ndarray
    logits: np.ndarray
    pages: np.ndarray
    copied: np.ndarray
    phase: np.ndarray
    recurs: np.ndarray
    period: tuple[int, int]

    def load(self, sweep: int) -> SweepLoad:
        """What one sweep has to do."""
        return as_load(self.groups[sweep], self.logits[sweep], self.copied[sweep])

    def generating(self, tokens: float) -> JobSweeps:
        """The same sweeps, those of the period recurring as often as makes so many tokens in all.

        Rows of many lengths are a sample; so it does not matter whether those of the period were longer than the mean.
        """
        first, last = self.period
        if first == last:
            return self
        once = self.logits[first:last].sum()
        recurs = self.recurs.copy()
        recurs[first:last] = max(0.0, tokens - (self.logits.sum() - once)) / once
        return replace(self, recurs=recurs)

    @property
    def rows(self) -> np.ndarray:
        """Rows in flight."""
        return self._sums("decode_rows", "prompt_rows")

    @property
    def tokens(self) -> np.ndarray:
        """Tokens that each sweep advances."""
        return self._sums("decode_rows", "prompt_tokens")

    def _sums(self, *names: str) -> np.ndarray:
        """Fields of every group added up, by sweep."""
        summed: np.ndarray = self.groups[:, :, [_FIELDS.index(name) for name in names]].sum(axis=(1, 2))
        return summed


def as_load(groups: np.ndarray, logits: float, copied: np.ndarray) -> SweepLoad:
    """A load from ``[modes, fields of RowGroup]``, and the pages that are copied on each of `COPY_LANES`."""
    found = {
        mode: RowGroup(**dict(zip(_FIELDS, map(float, values), strict=True)))
        for mode, values in zip(MODES, groups, strict=True)
        if values.any()
    }
    moved = {lane: float(pages) for lane, pages in zip(COPY_LANES, copied, strict=True) if pages}
    return SweepLoad(groups=found, logits=float(logits), copied=moved)


def job_sweeps(
    policy: Policy,
    allocation: Allocation,
    workload: Workload,
    *,
    whole: bool,
    seed: int = 0,
    rows: Sequence[tuple[int, int]] | None = None,
) -> JobSweeps:
    """Follow a job of ``workload.num_requests`` rows.

    Args:
        whole: follow every row through every sweep, however long that takes.
        rows: every row in the order in which they wait, where it is known; it counts where every row is followed.

    Raises:
        InfeasibleError: a row fits no tier's KV cache.
    """
    endless, total = job_phases(policy, allocation, replace(workload, num_requests=None)), workload.num_requests or 0
    small = total * endless.row_sweeps <= ROW_SWEEPS
    if whole or small:
        window, each = WINDOW_BLOCKS * policy.block_size, workload.rows_per_prompt
        waiting = waiting_prompts(workload, window, seed) if rows is None else by_prompt(iter(rows), each)
        prefix = workload.prefix_len, workload.rows_per_prefix
        return _Job(policy, allocation, waiting, total, prefix=prefix).follow()
    return _followed_in_part(policy, allocation, workload, endless, seed)


def _followed_in_part(
    policy: Policy, allocation: Allocation, workload: Workload, endless: JobPhases, seed: int
) -> JobSweeps:
    """A large job: rows in bundles, and one period of its steady state, which where rows differ is whole windows."""
    mixed, static = bool(workload.lengths), policy.schedule == "static"
    # A static block ends with its longest row: of fewer bundles the longest would be shorter.
    most = max(_MOST_BUNDLES, policy.block_size if mixed and static else 0)
    others = _OTHER_LIVES + (2 * WINDOW_BLOCKS if mixed else 1)
    bundle = _bundle(policy, endless.rows_in_flight, min(most, ROW_SWEEPS / others / endless.row_sweeps))
    lives = ROW_SWEEPS / (endless.rows_in_flight / bundle * endless.row_sweeps) - _OTHER_LIVES
    rows = typical_rows(workload, seed)
    if mixed:
        settling, periods = 1, int(min(_MOST_PERIODS, lives) / WINDOW_BLOCKS - 1)
        rows = longest_first(rows, row_length, WINDOW_BLOCKS * _block_bundles(policy, bundle))
    else:
        settling = 1 if static else max(1, int(min(_MOST_SETTLING, lives / 2)))
        periods = int(min(_MOST_PERIODS, lives - settling))
    total = (workload.num_requests or 0) / bundle
    prompts = ((row,) * size for row, size in zip(rows, prompt_sizes(workload.rows_per_prompt)))
    prefix = workload.prefix_len, max(1.0, workload.rows_per_prefix / bundle)
    found = _Job(policy, allocation, prompts, total, bundle, settling, max(1, periods), mixed, prefix).follow()
    return found.generating(tokens_to_generate(workload))


def _bundle(policy: Policy, rows_in_flight: float, bundles: float) -> float:
    """Rows that move as one, not necessarily a whole number, for about so many bundles in flight.

    Of the numbers that are near, the one whose share of ``prefill_tokens`` is nearest to a whole number.
    """
    bundles = max(_FEWEST_BUNDLES, bundles)
    if rows_in_flight <= bundles:
        return 1.0
    sizes = [rows_in_flight / count for count in range(ceil(bundles), ceil(1.25 * bundles) + 1)]

    def error(size: float) -> float:
        share = policy.prefill_tokens / size
        return abs(share - max(1, round(share))) / share

    return max(1.0, min(sizes, key=lambda size: (round(error(size), 3), -size)))


def _block_bundles(policy: Policy, bundle: float) -> int:
    return max(1, int(policy.block_size / bundle + 1e-9))


class _Job:
    """Follows a job sweep by sweep.

    Args:
        prompts: lengths of the rows, or bundles, of each prompt, in the order in which they wait.
        total: how many there are.
        bundle: rows that each stands for.
        settling: lives of a row, or static blocks, to follow before the steady state; windows where rows differ.
        periods: likewise of the steady state, before the rest of it is skipped; 0: skip nothing.
        mixed: rows differ, and each window of them begins with the longest.
        prefix: tokens that prompts have in common, and how many prompts, or bundles of such, do.
    """

    def __init__(
        self,
        policy: Policy,
        allocation: Allocation,
        prompts: Iterator[Sequence[Row]],
        total: float,
        bundle: float = 1.0,
        settling: int = 0,
        periods: int = 0,
        mixed: bool = False,
        prefix: tuple[int, float] = (0, 1.0),
    ):
        self._prompts, self._left, self._bundle = prompts, total, bundle
        self._settling, self._periods = settling, periods
        self._prefix_len, self._per_prefix = prefix[0] if prefix[1] > 1 else 0, prefix[1]
        self._prefix: Prefix[RowLengths] | None = None
        self._prefix_left, self._gpu_batch_size = 0.0, policy.gpu_batch_size
        self._static = policy.schedule == "static"
        self._layout, self._recompute_past = allocation.kv_layout, allocation.recompute_past
        self._room = {tier: int(allocation.kv_pages[tier] / bundle) for tier in TIERS}
        self._block = _block_bundles(policy, bundle)
        self._window = WINDOW_BLOCKS * self._block if mixed else 0
        most = policy.most_fetched(allocation.tails)
        self._admission: Admission[RowLengths] = Admission(
            replace(
                policy,
                gpu_batch_size=self._block,
                num_gpu_batches=1,
                prefill_tokens=max(1, round(policy.prefill_tokens / bundle)),
            ),
            pages=self._room,
            tails=ceil(allocation.tails / bundle),
            layout=self._layout,
            recompute_past=self._recompute_past,
            most_fetched=None if most is None else ceil(most / bundle),
        )
        self._groups: list[list[list[float]]] = []
        self._logits: list[int] = []
        self._pages: list[list[int]] = []
        self._copied: list[list[float]] = []
        self._phase: list[str] = []
        self._entered = self._finished = self._most = self._blocks_begun = 0
        self._first: tuple[int, int, int] | None = None  # sweep, rows entered, rows finished where the period begins
        self._period: tuple[int, int] | None = None
        self._recurs = 1.0

    def follow(self) -> JobSweeps:
        """All sweeps until no row is left."""
        fresh = True  # no row has ended since the block was empty
        while True:
            empty = not self._admission.running
            fresh = fresh or empty
            self._blocks_begun += empty
            if self._periods and self._period is None:
                self._watch_for_period(empty)
            self._fill_queue()
            before = self._admission.rows_waiting
            rows = self._admission.plan_sweep()
            if not rows:
                break
            self._entered += before - self._admission.rows_waiting
            fresh = self._sweep(rows) == 0 and fresh
            self._phase.append(self._name_phase(fresh))
        if self._admission.unfinished:
            raise InfeasibleError(
                f"{self._admission.unfinished} rows wait that no tier's KV cache holds: the largest has room for "
                f"{self._admission.largest_row_tokens()} tokens; raise a tier's share of the KV cache, or shorten the rows"
            )
        return self._result()

    def _name_phase(self, fresh: bool) -> str:
        prefilled = any(group[_FIELDS.index("prompt_rows")] for group in self._groups[-1])
        if fresh:
            return "fill" if prefilled else "steady"
        return "drain" if self._static or not self._admission.waiting else "steady"

    def _fill_queue(self) -> None:
        while self._admission.rows_waiting < self._block and self._left >= 0.5:
            rows = [RowLengths(prompt=s, limit=s + n) for s, n in next(self._prompts)][: ceil(self._left - 0.5)]
            self._left -= len(rows)
            share(rows, self._layout, self._recompute_past, self._next_prefix())
            self._admission.submit(rows)

    def _next_prefix(self) -> Prefix[RowLengths] | None:
        """What the next prompt has in common with those before it."""
        if not self._prefix_len:
            return None
        if self._prefix is None or self._prefix_left < 0.5:
            self._prefix, self._prefix_left = Prefix(tokens=self._prefix_len), self._prefix_left + self._per_prefix
        self._prefix_left -= 1
        return self._prefix

    def _read_once(self, rows: list[RowLengths], groups: list[list[float]]) -> None:
        """What rows of a GPU batch have in common is read once for them: rows that share lie together in a block."""
        holders: dict[tuple[int, Prefix[RowLengths]], list[RowLengths]] = {}
        for row in rows if not self._layout.windowed else ():
            for prefix in row.held.prefix.path if row.held is not None else ():
                holders.setdefault((_MODE_OF[row.tier, row.mode], prefix), []).append(row)
        for (mode, prefix), sharing in holders.items():
            own, count = prefix.tokens - (prefix.parent.tokens if prefix.parent else 0), len(sharing) * self._bundle
            again = own * max(0.0, 1 - ceil(count / self._gpu_batch_size) / count)
            for row in sharing:
                groups[mode][1 if row.run == 1 and row.generated else 4] -= again

    def _sweep(self, rows: list[RowLengths]) -> int:
        """One sweep; returns how many rows end in it."""
        admission, groups, logits, ended = self._admission, [[0.0] * len(_FIELDS) for _ in MODES], 0, []
        self._pages.append([admission.held(tier) for tier in TIERS])
        changes = admission.prefixes.changes
        copies = ((source.tier, copy.tier, copy.pages) for copy, source in changes if source is not None)
        moved = copied_by_lane(copies)
        self._copied.append([moved.get(lane, 0.0) for lane in COPY_LANES])
        self._read_once(rows, groups)
        for row in rows:
            group, run, past = groups[_MODE_OF[row.tier, row.mode]], row.run, row.cached
            if run == 1 and row.generated:
                group[0] += 1
                group[1] += past + 1
            else:
                group[2] += 1
                group[3] += run
                group[4] += past
                group[5] += run * (past + run / 2)
            logits += row.logits
            admission.commit(row, row.logits)
            if row.prompt + row.generated == row.limit:
                ended.append(row)
        for row in ended:
            admission.finish(row)
        admission.end_sweep()
        admission.prefixes.opened.clear()
        admission.prefixes.changes.clear()
        self._groups.append(groups)
        self._logits.append(logits)
        self._finished += len(ended)
        self._most = max(self._most, len(rows))
        return len(ended)

    def _watch_for_period(self, empty: bool) -> None:
        """Note where the period that stands for the rest begins and ends; then skip what it stands for."""
        sweep = len(self._logits)
        if self._first is None:
            if self._has_passed(0, self._settling, empty):
                self._first = (sweep, self._entered, self._finished)
            return
        first, entered, finished = self._first
        over = self._has_passed(finished, self._periods, empty)
        if over and self._entered > entered:
            rows = self._entered - entered
            skipped = int(self._left / rows)
            self._left -= skipped * rows
            self._recurs, self._period = 1.0 + skipped, (first, sweep)

    def _has_passed(self, finished: int, periods: int, empty: bool) -> bool:
        """Whether so many periods have passed since ``finished`` rows had ended."""
        if self._window:
            return (empty or not self._static) and self._finished >= finished + periods * self._window
        if self._static:
            return empty and self._blocks_begun > self._settling + (periods if self._first else 0)
        return self._finished >= finished + periods * self._most > 0

    def _result(self) -> JobSweeps:
        sweeps, bundle = len(self._logits), self._bundle
        recurs = np.ones(sweeps)
        period = self._period or (0, 0)
        recurs[period[0] : period[1]] = self._recurs
        return JobSweeps(
            groups=np.array(self._groups).reshape(sweeps, len(MODES), len(_FIELDS)) * bundle,
            logits=np.array(self._logits) * bundle,
            pages=np.array(self._pages).reshape(sweeps, len(TIERS)) * bundle,
            copied=np.array(self._copied).reshape(sweeps, len(COPY_LANES)) * bundle,
            phase=np.array(self._phase),
            recurs=recurs,
            period=period,
        )
