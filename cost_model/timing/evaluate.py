"""What a policy will do on a machine: `evaluate` checks its bytes and predicts its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import Allocation
from cost_model.memory.memory_plan import MemoryPlan, remedies
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.timing.job_phases import job_phases
from cost_model.timing.op_costs import Costs
from cost_model.timing.phase_loads import Phase
from cost_model.timing.problem import Problem
from cost_model.timing.sweep_bounds import SweepForm, SweepTime
from cost_model.timing.sweep_load import SweepLoad
from policies.common.errors import InfeasibleError
from policies.common.memory_units import GIB
from policies.policy import Policy
from policies.workload import Workload

if TYPE_CHECKING:
    from cost_model.routing.expert_usage import ExpertUsage

_Timed = tuple[Phase, SweepTime]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is expected of a policy.

    Attributes:
        tokens_per_s: generated tokens per second of the whole job, prefill and decode; of the steady state where the
            job is endless.
        prefill_tokens_per_s: prompt tokens per second of the sweeps that prefill.
        decode_tokens_per_s: generated tokens per second of the steady state.
        job_s: seconds of the job, loading excluded; None where it is endless.
        sweep_s: mean seconds of a sweep.
        row_s: seconds that a row is in flight, in the steady state.
        rows_in_flight: their mean in the steady state.
        lanes_s: seconds in which each lane is at work, of the whole job; of one period (a mean sweep, a static block) where
            it is endless.
        wall_s: the seconds that ``lanes_s`` belong to; none of them is larger.
        bottleneck: what decides most of the time: a thread, a shared resource, "schedule" or "slots".
        memory: bytes per tier, item by item.
        budgets: bytes that may be taken, by tier.
        allocation: counts that the bytes follow from.
    """

    tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    job_s: float | None
    sweep_s: float
    row_s: float
    rows_in_flight: float
    lanes_s: Mapping[str, float]
    wall_s: float
    bottleneck: str
    memory: MemoryPlan
    budgets: Mapping[str, int | None]
    allocation: Allocation

    def to_json(self) -> dict[str, Any]:
        """The section "predicted" of a policy file."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "job_s": self.job_s,
            "sweep_s": self.sweep_s,
            "row_s": self.row_s,
            "rows_in_flight": self.rows_in_flight,
            "bottleneck": self.bottleneck,
            "lanes_s": dict(self.lanes_s),
            "wall_s": self.wall_s,
            "memory_bytes": {tier: self.memory.total(tier) for tier in self.memory.parts},
        }


def evaluate(
    arch: ModelArch,
    hardware: Hardware,
    workload: Workload,
    policy: Policy,
    *,
    dtype_bytes: int | None = None,
    kv_tokens: int | None = None,
    usage: ExpertUsage | None = None,
    on_demand: bool = True,
    ignore_memory: bool = False,
) -> Prediction:
    """Judge a policy.

    Args:
        arch, hardware, workload, policy: the model on the machine for the job under the policy.
        dtype_bytes: bytes of one number in the compute dtype; default: as stored.
        kv_tokens: KV capacity over all tiers; default: what keeps the block in flight.
        usage: how often each expert was chosen; default: all alike.
        on_demand: sweeps of few rows move only the experts that were routed to.
        ignore_memory: predict a policy that does not fit, too.

    Raises:
        InfeasibleError: a tier has too few bytes; the sentence says how many are missing. Or the usage, or the policy's
            order of experts or format of weights, is of another model.
    """
    arch = packed_as(arch, policy.compress_weight)
    problem = Problem.of(
        arch, hardware, workload, dtype_bytes=dtype_bytes, kv_tokens=kv_tokens, usage=usage, on_demand=on_demand
    )
    return predict(problem, policy, ignore_memory=ignore_memory)


def predict(problem: Problem, policy: Policy, *, ignore_memory: bool = False) -> Prediction:
    """`evaluate` for many policies of one problem."""
    allocation, memory = problem.sized(policy)
    budgets = problem.hardware.budgets()
    if not ignore_memory:
        memory.check(budgets, _remedies(problem.hardware))
    return _predict(problem.costs(policy, allocation), policy, problem.workload, memory, budgets)


def _remedies(hardware: Hardware) -> dict[str, str]:
    """What to change, by budget; that of the GPU is not what `gpu_mem` says."""
    usual = remedies()
    if hardware.device == "cpu":
        return usual
    has, kept = (size / GIB for size in (hardware.gpu.memory_bytes, hardware.gpu.reserved_bytes))
    return usual | {
        "gpu": f"of its {has:.4g} GiB the context, the kernels and the allocator take {kept:.4g}; {usual['gpu']}"
    }


def _predict(
    costs: Costs, policy: Policy, workload: Workload, memory: MemoryPlan, budgets: Mapping[str, int | None]
) -> Prediction:
    job = job_phases(policy, costs.allocation, workload, most_on_demand=costs.routing.most_on_demand)
    form = SweepForm(costs, policy.gpu_batch_size)
    timed = [(phase, form.time(phase.load)) for phase in job.phases if phase.sweeps > 0]
    total_s = sum(phase.sweeps * time.total_s for phase, time in timed)
    sweeps = sum(phase.sweeps for phase, _ in timed)
    prefill = [(phase, time) for phase, time in timed if phase.load.prompt_tokens]
    steady = [(p, t) for p, t in timed if p.name == "steady"] or timed
    steady_s = sum(p.sweeps * t.total_s for p, t in steady)
    return Prediction(
        tokens_per_s=job.tokens / total_s,
        prefill_tokens_per_s=_rate(prefill, lambda load: load.prompt_tokens),
        decode_tokens_per_s=_rate(steady, lambda load: load.logits),
        job_s=total_s if workload.num_requests is not None else None,
        sweep_s=total_s / sweeps,
        row_s=job.row_sweeps * steady_s / sum(p.sweeps for p, _ in steady),
        rows_in_flight=job.rows_in_flight,
        lanes_s={lane: sum(p.sweeps * t.lanes_s[lane] for p, t in timed) for lane in timed[0][1].lanes_s},
        wall_s=total_s,
        bottleneck=_bottleneck(timed),
        memory=memory,
        budgets=budgets,
        allocation=costs.allocation,
    )


def _rate(timed: Sequence[_Timed], tokens_of: Callable[[SweepLoad], float]) -> float:
    seconds = sum(phase.sweeps * time.total_s for phase, time in timed)
    return sum(phase.sweeps * tokens_of(phase.load) for phase, _ in timed) / seconds if seconds else 0.0


def _bottleneck(timed: Sequence[_Timed]) -> str:
    seconds: dict[str, float] = {}
    for phase, time in timed:
        seconds[time.bottleneck] = seconds.get(time.bottleneck, 0.0) + phase.sweeps * time.total_s
    return max(seconds, key=seconds.__getitem__)


def fits(memory: MemoryPlan, budgets: Mapping[str, int | None]) -> bool:
    """Whether every budget holds its tiers."""
    try:
        memory.check(budgets)
    except InfeasibleError:
        return False
    return True
