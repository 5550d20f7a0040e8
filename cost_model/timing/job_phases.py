"""A job as a few phases of like sweeps: filling up, the steady state, draining.

With B rows in flight that each live L sweeps, B / L rows end and enter per sweep. Admission is paced: at most
``prefill_tokens`` prompt tokens a sweep, so a block fills in F = B · s / prefill_tokens sweeps. At the even pace (F = L)
every sweep is alike; a faster pace makes waves: sweeps that prefill, then sweeps that only decode. A static block is a
job of its own that fills, marches and drains.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor

from cost_model.memory.allocation import PAGE_TOKENS, Allocation
from cost_model.timing.length_moments import RowMoments, row_moments
from cost_model.timing.sweep_load import RowGroup, SweepLoad
from policies.policy import Policy
from policies.workload import Workload

#: Gauss-Legendre nodes on [0, 1]: a ramp of load is met at two points.
_NODES = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)
#: Steps in which rows of different lengths end.
_STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """``sweeps`` of one load. ``name``: fill, steady or drain."""

    name: str
    sweeps: float
    load: SweepLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
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


def course(policy: Policy, allocation: Allocation, workload: Workload) -> Course:
    """How the job proceeds under a policy."""
    m = row_moments(workload)
    block, fill = _rows_in_flight(policy, allocation, m)
    life = _span(policy, m) + m.n - 1
    shares = mode_shares(policy, allocation)
    total = workload.num_requests
    if policy.schedule == "static":
        rounds = 1.0 if total is None else float(ceil(total / max(1, floor(block + 1e-9))))
        per_round = block if total is None else min(block, total / rounds)
        phases = _one_block(policy, m, shares, per_round, life, rounds)
        return Course(phases=phases, tokens=rounds * per_round * m.n, rows_in_flight=per_round, row_sweeps=life)
    if total is None:
        steady = _steady(policy, m, shares, block, block / life, 1.0)
        return Course(phases=steady, tokens=block / life * m.n, rows_in_flight=block, row_sweeps=life)
    if total <= block:
        phases = _one_block(policy, m, shares, float(total), life, 1.0)
        return Course(phases=phases, tokens=total * m.n, rows_in_flight=float(total), row_sweeps=life)
    phases = (_mixed_job if m.mixed else _waves)(policy, m, shares, float(total), block, min(fill, life))
    return Course(phases=phases, tokens=total * m.n, rows_in_flight=block, row_sweeps=life)


def _mixed_job(
    policy: Policy, m: RowMoments, shares: dict[str, float], total: float, block: float, ramp: float
) -> tuple[Phase, ...]:
    """More rows than the block holds, of many lengths: they drift apart, so the block is full until none waits."""
    life = _span(policy, m) + m.n - 1
    drain = _ends_of_all(m, shares, block)
    rest = total * life - block * ramp / 2 - sum(phase.sweeps * phase.load.rows for phase in drain)
    plateau = max(0.0, rest / block)
    entering = (total - block) / plateau if plateau else 0.0
    return (
        *_ramp_up(policy, m, shares, block, ramp, 1.0),
        *_steady(policy, m, shares, block, entering, plateau),
        *drain,
    )


def _waves(
    policy: Policy, m: RowMoments, shares: dict[str, float], total: float, block: float, ramp: float
) -> tuple[Phase, ...]:
    """More rows than the block holds, all alike: those that entered together leave together, and the next enter.

    The last wave is what is left over; at the even pace, waves overlap so that every sweep is alike.
    """
    life = _span(policy, m) + m.n - 1
    full, last = divmod(total - 1, max(1, floor(block + 1e-9)))
    last += 1
    plateau = max(0.0, full * max(life, ramp) - ramp)
    part = last / block
    between, alone = (block + last) / 2, life - ramp
    entering = (full - 1) * block / plateau if plateau else 0.0
    change = _steady(policy, m, shares, between, last / ramp, ramp)
    context = last * (m.s + (m.n + ramp) / 2)
    return (
        *_ramp_up(policy, m, shares, block, ramp, 1.0),
        *_steady(policy, m, shares, block, entering, plateau),
        *change,
        Phase(name="drain", sweeps=max(0.0, alone), load=_load(m, shares, decode=last, context=context)),
        *_ramp_down(m, shares, last, ramp * part - 1, 1.0),
    )


def mode_shares(policy: Policy, allocation: Allocation) -> dict[str, float]:
    """Share of the rows by how they are attended; their home tiers follow the KV pages."""
    total = sum(allocation.kv_pages.values())
    on_host = allocation.kv_pages["cpu"] / total
    attended = policy.cpu_attention_percent / 100
    shares = {
        "gpu": allocation.kv_pages["gpu"] / total,
        "fetch": on_host * (1 - attended),
        "disk": allocation.kv_pages["disk"] / total,
        "cpu": on_host * attended,
    }
    return {mode: share for mode, share in shares.items() if share}


def _span(policy: Policy, m: RowMoments) -> float:
    """Sweeps that a prompt takes."""
    return float(max(1, ceil(m.s / policy.prefill_tokens)))


def _rows_in_flight(policy: Policy, allocation: Allocation, m: RowMoments) -> tuple[float, float]:
    """(rows in flight, sweeps in which so many enter). Rows that enter together need room for s + n together."""
    life = _span(policy, m) + m.n - 1
    pace = policy.prefill_tokens / m.s
    staggered = m.s + (m.n + PAGE_TOKENS) / 2
    rows = float(policy.block_size)
    for _ in range(3):
        apart = min(1.0, rows / pace / life) if policy.schedule == "rolling" else 0.0
        each = m.held - max(0.0, m.held - staggered) * apart
        room = sum(allocation.kv_pages.values()) * PAGE_TOKENS / each
        rows = max(1.0, min(policy.block_size, room, pace * life))
    return rows, max(1.0, rows / pace)


def _one_block(
    policy: Policy, m: RowMoments, shares: dict[str, float], rows: float, life: float, rounds: float
) -> tuple[Phase, ...]:
    """Rows that start and end together."""
    ramp = max(min(rows * m.s / policy.prefill_tokens, life), _span(policy, m))
    fill = _ramp_up(policy, m, shares, rows, ramp, rounds)
    if m.mixed:
        return (*fill, *_march(m, shares, rows, ramp, rounds))
    context = rows * (m.s + m.n / 2)
    return (
        *fill,
        Phase(
            name="steady", sweeps=rounds * max(0.0, life - ramp), load=_load(m, shares, decode=rows, context=context)
        ),
        *_ramp_down(m, shares, rows, ramp - 1, rounds),
    )


def _march(m: RowMoments, shares: dict[str, float], rows: float, ramp: float, rounds: float) -> list[Phase]:
    """Rows that started within ``ramp`` sweeps go on to their ends, of which the last is that of the longest row."""
    shortest, longest = m.ends[0][0], m.longest(rows)
    ages = _steps(m, max(0.0, ramp / 2), longest - 1 + ramp / 2, (shortest,))
    found = []
    for start, end in ages:
        alive = m.mean_alive(start, end)
        load = _load(m, shares, decode=rows * alive, context=rows * alive * (m.s + (start + end) / 2))
        found.append(Phase(name="steady" if end <= shortest else "drain", sweeps=rounds * (end - start), load=load))
    return found


def _ends_of_all(m: RowMoments, shares: dict[str, float], rows: float) -> list[Phase]:
    """Rows of all ages end one by one, and none enters: so many are left as have as much before them."""
    longest = m.longest(rows)
    found = []
    for start, end in _steps(m, 0.0, longest, ()):
        middle = (start + end) / 2
        left = rows * m.mean_alive(middle, m.ends[-1][0]) * (m.ends[-1][0] - middle) / m.n
        load = _load(m, shares, decode=left, context=left * (m.s + (middle + m.ends[-1][0]) / 2))
        found.append(Phase(name="drain", sweeps=end - start, load=load))
    return found


def _steps(m: RowMoments, first: float, last: float, between: tuple[float, ...]) -> list[tuple[float, float]]:
    inner = {first + (last - first) * k / _STEPS for k in range(_STEPS + 1)} | {b for b in between if first < b < last}
    return list(pairwise(sorted(inner))) if last > first else []


def _ramp_up(
    policy: Policy, m: RowMoments, shares: dict[str, float], rows: float, sweeps: float, rounds: float
) -> list[Phase]:
    pace = rows / sweeps if sweeps else 0.0
    loads = [
        _load(
            m, shares, decode=x * rows - pace / 2, context=x * rows * (m.s + x * sweeps / 2), enter=pace, policy=policy
        )
        for x in _NODES
    ]
    return [Phase(name="fill", sweeps=rounds * sweeps / 2, load=load) for load in loads if sweeps]


def _ramp_down(m: RowMoments, shares: dict[str, float], rows: float, sweeps: float, rounds: float) -> list[Phase]:
    loads = [_load(m, shares, decode=x * rows, context=x * rows * (m.s + m.n - x * sweeps / 2)) for x in _NODES]
    return [Phase(name="drain", sweeps=rounds * sweeps / 2, load=load) for load in loads if sweeps > 0]


def _steady(
    policy: Policy, m: RowMoments, shares: dict[str, float], rows: float, enter: float, sweeps: float
) -> tuple[Phase, ...]:
    """``enter`` rows per sweep on average; at a faster pace only some of the sweeps prefill."""
    life = _span(policy, m) + m.n - 1
    context = rows / life * (m.ns + m.nn / 2 + m.n)
    prefilling = min(1.0, enter * m.s / min(policy.prefill_tokens, rows * m.s))
    busy = _load(
        m, shares, decode=rows * (m.n - 1) / life, context=context, enter=enter / max(prefilling, 1e-12), policy=policy
    )
    only = _load(m, shares, decode=rows * m.n / life, context=context)
    both = (Phase(name="steady", sweeps=sweeps * prefilling, load=busy),)
    rest = sweeps * (1 - prefilling)
    return (*both, Phase(name="steady", sweeps=rest, load=only)) if rest > 1e-9 * sweeps else both


def _load(
    m: RowMoments,
    shares: dict[str, float],
    *,
    decode: float,
    context: float,
    enter: float = 0.0,
    policy: Policy | None = None,
) -> SweepLoad:
    """A sweep in which ``decode`` rows decode over ``context`` tokens together and ``enter`` prompts are prefilled."""
    decode = max(0.0, decode)
    span = _span(policy, m) if policy else 1.0
    return SweepLoad(
        groups={
            mode: RowGroup(
                decode_rows=share * decode,
                decode_context=share * max(context, decode),
                prompt_rows=share * enter * span,
                prompt_tokens=share * enter * m.s,
                prompt_past=share * enter * m.s * (span - 1) / 2,
                pairs=share * enter * m.ss / 2,
            )
            for mode, share in shares.items()
        },
        logits=decode + enter,
    )
