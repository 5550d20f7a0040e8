"""A job as a few phases of like sweeps: filling up, the steady state, draining.

With B rows in flight that each live L sweeps, B / L rows end and enter per sweep. Admission is paced: at most
``prefill_tokens`` prompt tokens a sweep, so a block fills in F = B · s / prefill_tokens sweeps. At the even pace (F = L)
every sweep is alike; a faster pace makes waves: sweeps that prefill, then sweeps that only decode. A static block is a
job of its own that fills, marches and drains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from cost_model.load import RowGroup, SweepLoad
from cost_model.sizes import BLOCK_TOKENS, Sizes
from policies.policy import Policy
from policies.workload import Workload

#: Gauss-Legendre nodes on [0, 1]: a ramp of load is met at two points.
_NODES = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)


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


@dataclass(frozen=True, slots=True)
class _Moments:
    """Means over the rows: prompt s, completion n, s², (n − 1) · s, (n − 1) · n."""

    s: float
    n: float
    ss: float
    ns: float
    nn: float


def course(policy: Policy, counts: Sizes, workload: Workload) -> Course:
    """How the job proceeds under a policy."""
    m = _moments(workload)
    block, fill = _rows_in_flight(policy, counts, m)
    life = _span(policy, m) + m.n - 1
    shares = mode_shares(policy, counts)
    if policy.schedule == "static":
        rounds, per_round = 1.0, block
        if workload.num_requests is not None:
            rounds = ceil(workload.num_requests / block - 1e-9)
            per_round = min(block, workload.num_requests / rounds)
        phases = _one_block(policy, m, shares, per_round, life, rounds)
        return Course(phases=phases, tokens=rounds * per_round * m.n, rows_in_flight=per_round, row_sweeps=life)
    if workload.num_requests is None:
        steady = _steady(policy, m, shares, block, block / life, 1.0)
        return Course(phases=steady, tokens=block / life * m.n, rows_in_flight=block, row_sweeps=life)
    total = float(workload.num_requests)
    if total <= block:
        phases = _one_block(policy, m, shares, total, life, 1.0)
        return Course(phases=phases, tokens=total * m.n, rows_in_flight=total, row_sweeps=life)
    ramp = min(fill, life)
    admitted = total - block
    plateau = life - ramp + admitted * life / block
    phases = (
        *_ramp_up(policy, m, shares, block, ramp, 1.0),
        *_steady(policy, m, shares, block, admitted / plateau if plateau else 0.0, plateau),
        *_ramp_down(m, shares, block, ramp, 1.0),
    )
    return Course(phases=phases, tokens=total * m.n, rows_in_flight=block, row_sweeps=life)


def mode_shares(policy: Policy, counts: Sizes) -> dict[str, float]:
    """Share of the rows by how they are attended; their home tiers follow the KV blocks."""
    total = sum(counts.kv_blocks.values())
    on_host = counts.kv_blocks["cpu"] / total
    attended = policy.cpu_attention_percent / 100
    shares = {
        "gpu": counts.kv_blocks["gpu"] / total,
        "fetch": on_host * (1 - attended),
        "disk": counts.kv_blocks["disk"] / total,
        "cpu": on_host * attended,
    }
    return {mode: share for mode, share in shares.items() if share}


@lru_cache(maxsize=64)
def _moments(workload: Workload) -> _Moments:
    entries = workload.lengths or ((workload.prompt_len, workload.gen_len, 1),)
    rows = sum(count for _, _, count in entries)

    def mean(value) -> float:
        return sum(value(s, n) * count for s, n, count in entries) / rows

    return _Moments(
        s=mean(lambda s, n: s),
        n=mean(lambda s, n: n),
        ss=mean(lambda s, n: s * s),
        ns=mean(lambda s, n: (n - 1) * s),
        nn=mean(lambda s, n: (n - 1) * n),
    )


def _span(policy: Policy, m: _Moments) -> float:
    """Sweeps that a prompt takes."""
    return float(max(1, ceil(m.s / policy.prefill_tokens)))


def _rows_in_flight(policy: Policy, counts: Sizes, m: _Moments) -> tuple[float, float]:
    """(rows in flight, sweeps in which so many enter). Rows that enter together need room for s + n together."""
    tokens = sum(counts.kv_blocks.values()) * BLOCK_TOKENS
    life = _span(policy, m) + m.n - 1
    pace = policy.prefill_tokens / m.s
    rows = float(policy.block_size)
    for _ in range(3):
        fill = min(rows / pace, life)
        longest = m.s + m.n - fill / 2 + BLOCK_TOKENS / 2
        if policy.schedule == "static":  # all march together, in whole blocks; the last token is never cached
            longest = ceil((m.s + m.n - 1) / BLOCK_TOKENS) * BLOCK_TOKENS
        rows = max(1.0, min(policy.block_size, tokens / longest, pace * life))
    return rows, rows / pace


def _one_block(
    policy: Policy, m: _Moments, shares: dict[str, float], rows: float, life: float, rounds: float
) -> tuple[Phase, ...]:
    """Rows that start and end together."""
    ramp = min(rows * m.s / policy.prefill_tokens, life)
    marching = max(0.0, life - max(ramp, _span(policy, m)))
    ramp = max(ramp, _span(policy, m))
    context = rows * (m.s + m.n / 2)
    return (
        *_ramp_up(policy, m, shares, rows, ramp, rounds),
        Phase(name="steady", sweeps=rounds * marching, load=_load(m, shares, decode=rows, context=context)),
        *_ramp_down(m, shares, rows, ramp - 1, rounds),
    )


def _ramp_up(
    policy: Policy, m: _Moments, shares: dict[str, float], rows: float, sweeps: float, rounds: float
) -> list[Phase]:
    pace = rows / sweeps if sweeps else 0.0
    loads = [
        _load(
            m, shares, decode=x * rows - pace / 2, context=x * rows * (m.s + x * sweeps / 2), enter=pace, policy=policy
        )
        for x in _NODES
    ]
    return [Phase(name="fill", sweeps=rounds * sweeps / 2, load=load) for load in loads if sweeps]


def _ramp_down(m: _Moments, shares: dict[str, float], rows: float, sweeps: float, rounds: float) -> list[Phase]:
    loads = [_load(m, shares, decode=x * rows, context=x * rows * (m.s + m.n - x * sweeps / 2)) for x in _NODES]
    return [Phase(name="drain", sweeps=rounds * sweeps / 2, load=load) for load in loads if sweeps > 0]


def _steady(
    policy: Policy, m: _Moments, shares: dict[str, float], rows: float, enter: float, sweeps: float
) -> tuple[Phase, ...]:
    """``enter`` rows per sweep on average; at a faster pace only some of the sweeps prefill."""
    life = _span(policy, m) + m.n - 1
    context = rows / life * (m.ns + m.nn / 2 + m.n)
    prefilling = min(1.0, enter * m.s / policy.prefill_tokens)
    busy = _load(
        m, shares, decode=rows * (m.n - 1) / life, context=context, enter=enter / max(prefilling, 1e-12), policy=policy
    )
    only = _load(m, shares, decode=rows * m.n / life, context=context)
    both = (Phase(name="steady", sweeps=sweeps * prefilling, load=busy),)
    rest = sweeps * (1 - prefilling)
    return (*both, Phase(name="steady", sweeps=rest, load=only)) if rest > 1e-9 * sweeps else both


def _load(
    m: _Moments,
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
