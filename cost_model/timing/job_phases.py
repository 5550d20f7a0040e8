"""A job as a few phases of like sweeps: filling up, the steady state, draining.

With B rows in flight that each live L sweeps, B / L rows end and enter per sweep (Little's law). Admission is paced: at most
``prefill_tokens`` prompt tokens a sweep, so a block fills in F = B · s / prefill_tokens sweeps. At the even pace (F = L)
every sweep is alike; a faster pace makes waves: sweeps that prefill, then sweeps that only decode. A static block is a
job of its own that fills, marches and drains. Of rows of many lengths no such form holds: they are followed from event to
event (`cost_model.timing.row_flow`). The letters are those of `cost_model.timing.phase_loads`, and

    N      rows of the whole job
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, floor

from cost_model.memory.allocation import PAGE_TOKENS, Allocation, common_tokens
from cost_model.timing.job_rows import BUNDLES, STATIC_BUNDLES, followed_rows
from cost_model.timing.length_moments import RowMoments, row_moments
from cost_model.timing.phase_loads import (
    Phase,
    PhaseLoads,
    copied_per_row,
    mode_shares,
    pages_of_homes,
    shares_of_whole_rows,
)
from cost_model.timing.row_flow import Stretch, flow
from cost_model.timing.sweep_load import RowGroup, SweepLoad
from policies.admission.kv_pages import KVPages
from policies.admission.order import WINDOW_BLOCKS
from policies.policy import Policy
from policies.workload import Workload

#: Of rows of different lengths: parts of the sweeps of a job, beside one of each kind.
_PARTS = 6
#: What makes a whole number of rows of one that was rounded down.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPhases:
    """The phases of the whole job or, where it is endless, of one period.

    Attributes:
        tokens: what they generate.
        rows_in_flight: mean of the steady state.
        row_sweeps: sweeps that a row lives.
    """

    phases: tuple[Phase, ...]
    tokens: float
    rows_in_flight: float
    row_sweeps: float


def job_phases(policy: Policy, allocation: Allocation, workload: Workload, *, most_on_demand: float = 0.0) -> JobPhases:
    """How the job proceeds under a policy.

    Args:
        most_on_demand: tokens of the largest sweep whose experts come on demand. Of rows of different lengths such sweeps and
            larger ones are never in one phase, as their times lie far apart.
    """
    m = row_moments(workload)
    most = min(policy.block_size, workload.num_requests or policy.block_size)
    shares = mode_shares(policy, allocation, most, _mean_row_pages(allocation, m))
    loads = PhaseLoads(moments=m, shares=shares, prefill_tokens=policy.prefill_tokens)
    if m.mixed or workload.has_common:
        return _mixed_job(policy, allocation, workload, m, floor(most_on_demand + _ROUNDING))
    block, fill = _rows_in_flight(policy, allocation, loads)
    life, total = loads.life_sweeps, workload.num_requests
    if policy.schedule == "static":
        rounds = 1.0 if total is None else float(ceil(total / max(1, floor(block + _ROUNDING))))
        rows = block if total is None else min(block, total / rounds)
        phases, tokens = _one_block(loads, rows, rounds), rounds * rows * m.n
    elif total is None:
        rows, phases, tokens = block, loads.steady(block, block / life, 1.0), block / life * m.n
    elif total <= block:
        rows = float(total)
        phases, tokens = _one_block(loads, rows, 1.0), total * m.n
    else:
        rows, phases, tokens = block, _waves(loads, float(total), block, min(fill, life)), total * m.n
    return JobPhases(phases=tuple(phases), tokens=tokens, rows_in_flight=rows, row_sweeps=life)


def _mean_row_pages(allocation: Allocation, m: RowMoments) -> int:
    return allocation.kv_layout.held(ceil(m.s + m.n - 1))


def _rows_in_flight(policy: Policy, allocation: Allocation, loads: PhaseLoads) -> tuple[float, float]:
    """(B, F): as many rows as the policy asks for, the KV cache holds and the pace keeps in flight.

    Of rows of all ages each holds s + n / 2 tokens and half a page; rows that enter together hold `RowMoments.held` together,
    which is more. Between the two the need is linear in F / L, the part of a row's life over which its block enters; F follows
    from B, so the equation is solved by three rounds of inserting. The pace, prefill_tokens / s rows per sweep, keeps L
    times as many in flight.
    """
    m, life = loads.moments, loads.life_sweeps
    pace = policy.prefill_tokens / m.s
    staggered = m.s + (m.n + PAGE_TOKENS) / 2
    homes = pages_of_homes(allocation, _mean_row_pages(allocation, m))
    pages = sum(homes.values()) - allocation.kv_layout.entering(m.s, policy.prefill_tokens)
    rows = float(policy.block_size)
    for _ in range(3):
        apart = min(1.0, rows / pace / life) if policy.schedule == "rolling" else 0.0
        each = m.held - max(0.0, m.held - staggered) * apart
        room = pages / allocation.kv_layout.mean(each)
        rows = max(1.0, min(policy.block_size, room, pace * life))
    return rows, max(1.0, rows / pace)


def _one_block(loads: PhaseLoads, rows: float, rounds: float) -> list[Phase]:
    """Rows that start and end together, in as many rounds.

    They enter within F sweeps, of which the last one's life begins in sweep F and ends in sweep F + L - 1: after the fill
    come L - F sweeps in which all decode, at the mean context s + n / 2, and F - 1 in which they end.
    """
    m, life = loads.moments, loads.life_sweeps
    fill_sweeps = max(min(rows * m.s / loads.prefill_tokens, life), loads.prompt_sweeps)
    fill = loads.fill(rows, fill_sweeps, rounds)
    load = loads.load(decode=rows, context=rows * (m.s + m.n / 2))
    return [
        *fill,
        Phase(name="steady", sweeps=rounds * max(0.0, life - fill_sweeps), load=load),
        *loads.drain(rows, fill_sweeps - 1, rounds),
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """Sweeps of a job of rows of many lengths, as one mean sweep."""

    name: str
    sweeps: float
    rows: RowGroup
    logits: float


def _mixed_job(
    policy: Policy, allocation: Allocation, workload: Workload, m: RowMoments, most_on_demand: int
) -> JobPhases:
    """Rows of many lengths, followed through the admission."""
    row_pages, static = _mean_row_pages(allocation, m), policy.schedule == "static"
    room = sum(pages_of_homes(allocation, row_pages).values())
    room -= ceil(allocation.kv_layout.entering(m.s, policy.prefill_tokens))
    parts = _parts_of_job(
        workload, policy.block_size, policy.prefill_tokens, room, static, allocation.kv_layout, most_on_demand
    )
    read_once = 0.0 if allocation.kv_layout.windowed else common_tokens(workload, policy.gpu_batch_size)
    phases = [
        Phase(
            name=part.name,
            sweeps=part.sweeps,
            load=SweepLoad(
                groups={
                    mode: part.rows.part(share).reading_once(read_once)
                    for mode, share in shares_of_whole_rows(policy, allocation, part.rows.rows, row_pages).items()
                },
                logits=part.logits,
                copied={
                    lane: (part.logits - part.rows.decode_rows) * pages
                    for lane, pages in copied_per_row(workload, allocation, part.rows.rows, row_pages).items()
                },
            ),
        )
        for part in parts
    ]
    steady = [part for part in parts if part.name == "steady"] or parts
    total = workload.num_requests
    return JobPhases(
        phases=tuple(phases),
        tokens=sum(part.sweeps * part.logits for part in parts) if total is None else total * m.n,
        rows_in_flight=sum(part.sweeps * part.rows.rows for part in steady) / sum(part.sweeps for part in steady),
        row_sweeps=max(1, ceil(m.s / policy.prefill_tokens)) + m.n - 1,
    )


#: What the sweeps of a part are alike in: their name, whether they have prompts, whether their experts may come on demand.
_Kind = tuple[str, bool, bool]


@lru_cache(maxsize=4096)
def _parts_of_job(
    workload: Workload, block: int, pace: int, room: int, static: bool, layout: KVPages, most_on_demand: int
) -> tuple[_Part, ...]:
    """The sweeps of a job of rows of many lengths, or of one period where it is endless, a few of each kind."""
    kinds: dict[_Kind, list[tuple[Stretch, float]]] = {}
    for each, sweeps in _followed(workload, block, pace, room, static, layout):
        kind = _name(each, static), each.prompt_tokens > 0, each.decode_rows + each.prompt_tokens <= most_on_demand
        kinds.setdefault(kind, []).append((each, sweeps))
    whole, found = sum(sweeps for members in kinds.values() for _, sweeps in members), []
    for (name, *_), members in kinds.items():
        members.sort(key=lambda member: member[0].decode_rows + member[0].prompt_tokens)
        sweeps = sum(count for _, count in members)
        found += [_mean(name, part) for part in _parts(members, sweeps, 1 + round(_PARTS * sweeps / whole))]
    return tuple(found)


@lru_cache(maxsize=4096)
def _followed(
    workload: Workload, block: int, pace: int, room: int, static: bool, layout: KVPages
) -> tuple[tuple[Stretch, float], ...]:
    """The stretches of a job of rows of many lengths, or of one period where it is endless, and how many sweeps each stands for.

    Of a long job the first windows are followed, and what recurs of these counts as often as makes all its rows: the sweeps
    in which the rows of the second window and of those after it enter.
    """
    window, total = WINDOW_BLOCKS * block, workload.num_requests
    rows, windows = followed_rows(workload, window, STATIC_BUNDLES if static else BUNDLES)
    held_once = 0.0 if layout.windowed else common_tokens(workload, block)
    stretches = flow(
        rows,
        block=block,
        pace=pace,
        room=room,
        static=static,
        layout=layout,
        rows_per_prompt=workload.rows_per_prompt,
        prefix=(workload.prefix_len, workload.rows_per_prefix),
        held_share=1 - held_once / (workload.prompt_len + workload.gen_len),
    )
    recurring = ((total - 1) // window - 1) / (windows - 1) if windows and total is not None else 1.0
    once = 0.0 if windows and total is None else 1.0
    recurs = _between(stretches, window, windows * window) if windows else [False] * len(stretches)
    counted = (
        (each, each.sweeps * (recurring if again else once)) for each, again in zip(stretches, recurs, strict=True)
    )
    return tuple((each, sweeps) for each, sweeps in counted if sweeps)


def _between(stretches: Sequence[Stretch], first: int, last: int) -> list[bool]:
    """Which stretches begin when so many rows have entered, and no more than those, and rows wait."""
    entered = accumulate((each.sweeps * each.entered for each in stretches), initial=0.0)
    begin, end = first * (1 - _ROUNDING), last * (1 - _ROUNDING)
    return [each.waiting and begin <= before < end for each, before in zip(stretches, entered)]


def _name(stretch: Stretch, static: bool) -> str:
    if stretch.fresh:
        return "fill" if stretch.prompt_tokens else "steady"
    return "drain" if static or not stretch.waiting else "steady"


def _parts(members: list[tuple[Stretch, float]], sweeps: float, count: int) -> Iterator[list[tuple[Stretch, float]]]:
    """The stretches in order, in up to so many parts of about as many sweeps."""
    part, reached, ends = list[tuple[Stretch, float]](), 0.0, 1
    for each, own in members:
        part.append((each, own))
        reached += own
        if reached >= sweeps * ends / count:
            yield part
            part, ends = [], int(reached * count / sweeps) + 1
    if part:
        yield part


def _mean(name: str, part: Sequence[tuple[Stretch, float]]) -> _Part:
    sweeps = sum(count for _, count in part)

    def mean(value: Callable[[Stretch], float]) -> float:
        return sum(value(each) * count for each, count in part) / sweeps

    decode, entered = mean(lambda each: each.decode_rows), mean(lambda each: each.entered)
    rows = RowGroup(
        decode_rows=decode,
        decode_context=max(decode, mean(lambda each: each.decode_context)),
        prompt_rows=mean(lambda each: each.prompt_rows),
        prompt_tokens=mean(lambda each: each.prompt_tokens),
        prompt_past=mean(lambda each: each.prompt_past),
        pairs=mean(lambda each: each.pairs),
    )
    return _Part(name, sweeps, rows, decode + entered)


def _waves(loads: PhaseLoads, total: float, block: float, fill_sweeps: float) -> list[Phase]:
    """More rows than the block holds, all alike: those that entered together leave together, and the next enter.

    N rows are w waves of B rows each and a last one of 1 to B rows, R. A wave begins every max(L, F) sweeps. So the block is
    full from F to w max(L, F), while w - 1 waves enter; then for F sweeps wave w leaves and the last one enters, (B + R) / 2
    rows on average; then for L - F sweeps the last one is alone, aged F to L, about (n + F) / 2 in the mean; and it leaves
    within F R / B - 1 sweeps, as it entered. At the even pace, F = L, waves overlap so that every sweep is alike.
    """
    m, life = loads.moments, loads.life_sweeps
    waves, last = divmod(total - 1, max(1, floor(block + _ROUNDING)))
    last += 1
    full_sweeps = max(0.0, waves * max(life, fill_sweeps) - fill_sweeps)
    entering = (waves - 1) * block / full_sweeps if full_sweeps else 0.0
    alone = loads.load(decode=last, context=last * (m.s + (m.n + fill_sweeps) / 2))
    return [
        *loads.fill(block, fill_sweeps),
        *loads.steady(block, entering, full_sweeps),
        *loads.steady((block + last) / 2, last / fill_sweeps, fill_sweeps),
        Phase(name="drain", sweeps=max(0.0, life - fill_sweeps), load=alone),
        *loads.drain(last, fill_sweeps * (last / block) - 1),
    ]
