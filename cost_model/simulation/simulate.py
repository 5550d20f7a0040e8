"""A finite job from its first sweep to its last: how long it takes, what each lane does, what memory is in use when.

The rows pass through the admission that the runtime uses (`cost_model.simulation.job_sweeps`); the seconds of a sweep come from
replaying the schedule that the runtime follows (`cost_model.simulation.replay`). A small job is replayed sweep by sweep. Of a large one
sweeps of like load are timed together by the closed form, corrected by replays of a few of them (`cost_model.simulation.sweep_times`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.memory.memory_plan import MemoryPlan
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.job_sweeps import JobSweeps, job_sweeps
from cost_model.simulation.replay import replay
from cost_model.simulation.sweep_times import SweepTimes, like_times, operations, replayed_times
from cost_model.timing.problem import Problem
from policies.common.chrome_trace import Span, write_chrome_trace
from policies.common.errors import UsageError
from policies.placement import TIERS
from policies.policy import Policy
from policies.schedule import LANES
from policies.workload import Workload

#: Operations that are replayed when every sweep is; a larger job's sweeps are timed by groups of like ones.
REPLAYED_OPS = 400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The job sweep by sweep; what recurs of the steady state of a large job shows once, and then time continues.

    Attributes:
        start_s, end_s: of each sweep.
        rows: in flight.
        tokens: that it advances, prompt and decode.
        tokens_per_s: generated.
        memory_bytes: by tier, what is in use: the constant parts of the plan and the KV pages held.
        lanes_s: by lane, the seconds of each sweep in which it is at work.
    """

    start_s: np.ndarray
    end_s: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    tokens_per_s: np.ndarray
    memory_bytes: Mapping[str, np.ndarray]
    lanes_s: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a job does.

    Attributes:
        job_s: seconds, loading excluded.
        tokens_per_s: generated tokens per second of the whole job.
        sweeps: how many.
        phases_s: seconds of "fill" (the block fills), "steady" and "drain" (no row waits, and rows have ended).
        lanes_s: seconds in which each lane is at work.
        memory: bytes planned per tier, item by item.
        timeline: sweep by sweep.
        spans: every operation of the first sweeps, as far as they were asked for.
    """

    job_s: float
    tokens_per_s: float
    sweeps: int
    phases_s: Mapping[str, float]
    lanes_s: Mapping[str, float]
    memory: MemoryPlan
    timeline: Timeline
    spans: tuple[Span, ...]

    def write_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write ``spans`` as the runtime writes what ran.

        Raises:
            UsageError: no sweep was kept.
            StorageError: the directory is missing, read-only or full.
        """
        if not self.spans:
            raise UsageError("no sweep was kept for a trace; simulate with keep_trace_sweeps of at least 1")
        write_chrome_trace(path, self.spans)


def simulate(
    arch: ModelArch,
    hardware: Hardware,
    workload: Workload,
    policy: Policy,
    *,
    dtype_bytes: int | None = None,
    kv_tokens: int | None = None,
    usage: ExpertUsage | None = None,
    on_demand: bool = True,
    cache_experts: int = 0,
    full: bool = False,
    keep_trace_sweeps: int = 0,
    seed: int = 0,
    rows: Sequence[tuple[int, int]] | None = None,
) -> Simulation:
    """Run a job of ``workload.num_requests`` rows on paper.

    Every row generates what the workload says and ends there. Rows of a length histogram come in an order that ``seed``
    decides. Bytes are not checked against the machine; `evaluate` does that.

    Args:
        arch, hardware, workload, policy: the model on the machine for the job under the policy.
        dtype_bytes: bytes of one number in the compute dtype; default: as stored.
        kv_tokens: KV capacity over all tiers; default: what keeps the block in flight.
        usage: how often each expert was chosen; default: all alike.
        on_demand: sweeps of few rows move only the experts that were routed to.
        cache_experts: experts that device memory beyond what the policy takes holds.
        full: follow every row and replay every sweep, however long that takes.
        keep_trace_sweeps: keep the operations of so many sweeps, from the first on.
        seed: of the rows' order.
        rows: (prompt tokens, generated tokens) of every row in the order in which they wait, where it is known; it counts
            where every row is followed, because the job is small or ``full`` is asked for.

    Raises:
        UsageError: the workload is endless, or has another number of rows.
        InfeasibleError: a row fits no tier's KV cache; or the usage, or the policy's order of experts or format of weights, is
            of another model.
    """
    if workload.num_requests is None:
        raise UsageError("an endless job cannot be simulated; give the workload num_requests")
    if rows is not None and len(rows) != workload.num_requests:
        raise UsageError(f"{len(rows)} rows are given for a job of {workload.num_requests}")
    arch = packed_as(arch, policy.compress_weight)
    problem = Problem.of(
        arch,
        hardware,
        workload,
        dtype_bytes=dtype_bytes,
        kv_tokens=kv_tokens,
        usage=usage,
        on_demand=on_demand,
        cache_experts=cache_experts,
    )
    allocation = problem.allocate(policy)
    costs = problem.costs(policy, allocation)
    job = job_sweeps(policy, allocation, workload, whole=full, seed=seed, rows=rows)
    size, batches = policy.gpu_batch_size, float(np.ceil(job.rows / policy.gpu_batch_size).sum())
    replayed = full or operations(costs, batches / len(job.logits)) * len(job.logits) <= REPLAYED_OPS
    times = (replayed_times if replayed else like_times)(costs, size, job)
    memory = problem.memory(policy, allocation)
    page_bytes = arch.kv_page_bytes(PAGE_TOKENS, problem.dtype_bytes, compressed=policy.compress_cache)
    spans = replay(
        costs, [job.load(at) for at in range(min(keep_trace_sweeps, len(job.logits)))], size, keep_spans=True
    )
    return _summary(job, times, memory, page_bytes, tuple(spans.spans))


def _summary(
    job: JobSweeps, times: SweepTimes, memory: MemoryPlan, page_bytes: int, spans: tuple[Span, ...]
) -> Simulation:
    each_s = job.recurs * times.seconds
    job_s = float(each_s.sum())
    return Simulation(
        job_s=job_s,
        tokens_per_s=float((job.recurs * job.logits).sum()) / job_s,
        sweeps=round(float(job.recurs.sum())),
        phases_s={name: float(each_s[job.phase == name].sum()) for name in ("fill", "steady", "drain")},
        lanes_s=dict(zip(LANES, map(float, job.recurs @ times.lanes_s), strict=True)),
        memory=memory,
        timeline=_timeline(job, times, memory, page_bytes),
        spans=spans,
    )


def _timeline(job: JobSweeps, times: SweepTimes, memory: MemoryPlan, page_bytes: int) -> Timeline:
    """What recurs passes at once when its first period is over."""
    first, last = job.period
    ends = np.cumsum(times.seconds)
    starts = ends - times.seconds
    if last > first:
        passed = ((job.recurs - 1) * times.seconds)[first:last].sum()
        starts[last:] += passed
        ends[last:] += passed
    constant = {tier: memory.total(tier) - memory.parts[tier].get("kv", 0) for tier in TIERS}
    return Timeline(
        start_s=starts,
        end_s=ends,
        rows=job.rows,
        tokens=job.tokens,
        tokens_per_s=job.logits / times.seconds,
        memory_bytes={tier: constant[tier] + job.pages[:, at] * page_bytes for at, tier in enumerate(TIERS)},
        lanes_s=dict(zip(LANES, times.lanes_s.T, strict=True)),
    )
