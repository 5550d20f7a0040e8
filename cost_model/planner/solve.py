"""The planner: the policy with the most tokens per second, what it will do, and why it is that one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import Allocation
from cost_model.memory.memory_plan import expert_chunk
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.model.weight_units import group_on
from cost_model.planner.constraints import Fixed
from cost_model.timing.evaluate import Prediction, predict
from policies.common.checks import check_number
from policies.common.errors import InfeasibleError
from policies.placement import TIERS
from policies.policy import Policy
from policies.workload import Workload

if TYPE_CHECKING:
    from cost_model.planner.lp_model import Price
    from cost_model.planner.search import Optimum
    from cost_model.planner.what_if import Advice
    from cost_model.routing.expert_usage import ExpertUsage
    from cost_model.timing.problem import Problem

#: Each one asks for what the one before placed; one or two are enough but for the smallest of caches.
_MOST_ROUNDINGS = 8
#: Where all rows of a job choose each expert fewer times than this in a sweep, single experts are tried beside groups.
_FEW_CHOICES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why the policy is as it is.

    Attributes:
        bottleneck: what decides most of the time.
        prices: of what binds in the linear programme, dearest first: tokens per second that one GiB more of a memory, or
            1 % fewer seconds of a lane, would give.
        lp_tokens_per_s: the largest optimum of a linear programme, in which units, rows and batches are cut at will.
        advice: what would help most, solved again; empty unless it was asked for.
        programmes, evaluations: linear programmes that were solved, policies that were evaluated, advice included.
        seconds: that planning took.
    """

    bottleneck: str
    prices: tuple[Price, ...]
    lp_tokens_per_s: float
    advice: tuple[Advice, ...]
    programmes: int
    evaluations: int
    seconds: float = field(compare=False)

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``policy`` to run, ``prediction`` of what it will do, and the ``explanation``."""

    policy: Policy
    prediction: Prediction
    explanation: Explanation


def solve(
    arch: ModelArch,
    hardware: Hardware,
    workload: Workload,
    *,
    fixed: Fixed | None = None,
    schedule: str | None = None,
    dtype_bytes: int | None = None,
    kv_tokens: int | None = None,
    usage: ExpertUsage | None = None,
    on_demand: bool = True,
    advice: bool = False,
    allow_compression: bool = False,
    effort: float = 1.0,
) -> Plan:
    """The best policy of the model on the machine for the job. The same arguments give the same plan.

    Args:
        fixed: what is decided already.
        schedule: rolling or static; a short way to fix it.
        dtype_bytes: bytes of one number in the compute dtype; default: as stored.
        kv_tokens: KV capacity over all tiers; default: what keeps the block in flight.
        usage: how often each expert was chosen; experts that were used most are the first to become resident. Default: all
            are alike.
        on_demand: sweeps of few rows move only the experts that were routed to.
        advice: find out, too, what would help most.
        allow_compression: compress weights and KV cache where that gains and ``fixed`` does not say.
        effort: how long to search, by evaluations and not by the clock; less is quicker and may find a little less.

    Raises:
        InfeasibleError: nothing fits; the sentence names the limit, and how much of each capacity alone would do.
            Or the usage is of another model.
        UsageError: what is fixed contradicts itself, or the model's widths.
    """
    from cost_model.timing.problem import Problem  # with numpy, which help and flags do not need

    fixed = fixed or Fixed()
    if schedule is not None:
        fixed = replace(fixed, schedule=schedule)
    arch = packed_as(arch, fixed.compress_weight)
    arch = arch.grouped(group_on(hardware, arch))
    problem = Problem.of(
        arch, hardware, workload, dtype_bytes=dtype_bytes, usage=usage, kv_tokens=kv_tokens, on_demand=on_demand
    )
    if usage is not None:
        fixed = replace(fixed, expert_order=usage.unit_order(arch))
    search = _with_compression if allow_compression else _best
    return _plan(problem, fixed, search, advice=advice, effort=check_number("effort", effort))


@dataclass(frozen=True, slots=True)
class _Found:
    """The best policy, and the problem that it solves."""

    problem: Problem
    fixed: Fixed
    best: Optimum

    def counting(self, others: Iterable[Optimum]) -> _Found:
        """With what the search for others took."""
        programmes = self.best.programmes + sum(other.programmes for other in others)
        evaluations = self.best.evaluations + sum(other.evaluations for other in others)
        return replace(self, best=replace(self.best, programmes=programmes, evaluations=evaluations))


_Search = Callable[["Problem", Fixed, float], _Found]


def _plan(problem: Problem, fixed: Fixed, search: _Search, *, advice: bool, effort: float) -> Plan:
    from cost_model.planner.what_if import Hints, advise  # the programme's library is loaded only where a plan is made

    start = time.perf_counter()
    found = search(problem, fixed, effort)
    problem, fixed = found.problem, found.fixed
    policy = replace(achieved(problem, found.best.policy), experts_per_unit=problem.arch.group)
    policy = with_larger_chunk(problem, policy)
    prediction = predict(problem, policy)
    best = replace(found.best, policy=policy)
    hints = advise(problem, fixed, best, prediction.bottleneck) if advice else Hints()
    explanation = Explanation(
        bottleneck=prediction.bottleneck,
        prices=best.prices,
        lp_tokens_per_s=best.lp_tokens_per_s,
        advice=hints.advice,
        programmes=best.programmes + hints.programmes,
        evaluations=best.evaluations + hints.evaluations,
        seconds=time.perf_counter() - start,
    )
    return Plan(policy=policy, prediction=prediction, explanation=explanation)


def _best(problem: Problem, fixed: Fixed, effort: float) -> _Found:
    """The best policy of a problem.

    Raises:
        InfeasibleError: nothing fits.
    """
    from cost_model.planner.infeasible import refusal, smallest_policies
    from cost_model.planner.search import improved, optimum

    smallest = smallest_policies(problem, fixed)
    if not smallest:
        raise refusal(problem, fixed)
    found = _Found(problem, fixed, optimum(problem, fixed, smallest, effort))
    if problem.arch.group is not None and fixed.expert_order is None and _is_of_few_rows(problem):
        one_by_one = replace(problem, arch=replace(problem.arch, group=None))
        other = _Found(one_by_one, fixed, improved(one_by_one, fixed, found.best.policy))
        if other.best.tokens_per_s > found.best.tokens_per_s:
            return other.counting([found.best])
    return found


def _with_compression(problem: Problem, fixed: Fixed, effort: float) -> _Found:
    """The best policy, compressed where that gains; where nothing fits, with what changes numbers least of what does.

    Raises:
        InfeasibleError: nothing fits, however it is compressed.
    """
    from cost_model.planner.what_if import LEAST_GAIN, compressed, most_gaining

    try:
        plain = _best(problem, fixed, effort)
    except InfeasibleError:
        for changed in compressed(problem, fixed):
            with contextlib.suppress(InfeasibleError):
                return _best(changed.problem, changed.fixed, effort)
        raise
    tried = most_gaining(plain.problem, fixed, plain.best.policy)
    if tried is None:
        return plain
    packed = _best(*tried, effort)
    if packed.best.tokens_per_s < (1 + LEAST_GAIN) * plain.best.tokens_per_s:
        return plain.counting([packed.best])
    return packed.counting([plain.best])


def _is_of_few_rows(problem: Problem) -> bool:
    """Whether sweeps may leave experts out, so that a group of them would come for one that is asked for."""
    arch, rows = problem.arch, problem.workload.num_requests
    return rows is not None and rows * arch.top_k < _FEW_CHOICES * arch.num_experts


def with_larger_chunk(problem: Problem, policy: Policy) -> Policy:
    """The policy with more tokens of an expert computed at once, where the machine is faster so and the memory is there."""
    default = expert_chunk(policy, problem.hardware.device)
    rates = problem.hardware.gpu.experts[problem.dtype_bytes]
    chunk = rates.fastest(problem.arch.expert_params or problem.arch.dense_params, default)
    if chunk == default:
        return policy
    larger, allocation = replace(policy, expert_chunk=chunk), problem.allocate(policy)
    try:
        problem.memory(larger, allocation).check(problem.hardware.budgets())
    except InfeasibleError:
        return policy
    gains = problem.costs(larger, allocation).reached_expert_s(allocation.max_tokens) < problem.costs(
        policy, allocation
    ).reached_expert_s(allocation.max_tokens)
    return larger if gains else policy


def achieved(problem: Problem, policy: Policy) -> Policy:
    """The policy with the shares that its placement achieves; placing these again gives the same placement."""
    for _ in range(_MOST_ROUNDINGS):
        allocation = problem.allocate(policy)
        placed = with_achieved_shares(policy, allocation)
        if placed == policy or problem.allocate(placed) == allocation:
            return placed
        policy = placed  # the capacity grew for the longest row; what it grew to is asked for now
    return policy


def with_achieved_shares(policy: Policy, allocation: Allocation) -> Policy:
    """The policy with the shares that its allocation amount to: whole units, KV blocks and GPU batches."""
    w_gpu, w_cpu, _ = allocation.placement.achieved_percent
    cache_gpu, cache_cpu = _percents([allocation.kv_pages[tier] for tier in TIERS])
    act_gpu, act_cpu = _percents([allocation.activation_tiers.count(tier) for tier in TIERS])
    return replace(
        policy,
        w_gpu_percent=w_gpu,
        w_cpu_percent=w_cpu,
        cache_gpu_percent=cache_gpu,
        cache_cpu_percent=cache_cpu,
        act_gpu_percent=act_gpu,
        act_cpu_percent=act_cpu,
    )


def _percents(allocation: list[int]) -> tuple[float, float]:
    gpu, cpu = (100 * count / sum(allocation) for count in allocation[:2])
    return gpu, min(cpu, 100 - gpu)
