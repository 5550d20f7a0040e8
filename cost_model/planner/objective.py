"""The objective of the search: tokens per second of a policy, fitted to the memory that there is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cost_model.memory.allocation import PAGE_TOKENS, Allocation, residency
from cost_model.memory.memory_plan import MemoryPlan
from cost_model.model.weight_units import unit_slack_bytes
from cost_model.planner.constraints import Fixed
from cost_model.planner.moves import with_shares
from cost_model.timing.evaluate import predict
from cost_model.timing.problem import Problem
from policies.common.errors import InfeasibleError
from policies.placement import TIERS
from policies.policy import Policy

#: (problem, policy) to tokens per second.
Judge = Callable[[Problem, Policy], float]

_NO_LIMIT = 1 << 62
_TRIES = 4
#: So many GPU batches take as long to evaluate as all the rest.
_BATCHES = 15
#: Bytes alone, in evaluations.
_EFFORT_OF_BYTES = 0.3


def closed_tokens_per_s(problem: Problem, policy: Policy) -> float:
    """What `predict` says.

    Raises:
        InfeasibleError: a tier has too few bytes.
    """
    return predict(problem, policy).tokens_per_s


class Objective:
    """Evaluates each policy once.

    Args:
        problem: what is planned.
        fixed: what the user has decided; every fitted policy has it.
        judge: tokens per second of a policy; an `InfeasibleError` where it does not fit.

    Attributes:
        evaluations: policies that were evaluated.
        effort: time taken, in evaluations of a policy with few GPU batches; it does not depend on the clock.
    """

    def __init__(self, problem: Problem, fixed: Fixed, judge: Judge = closed_tokens_per_s):
        self.problem, self.fixed, self.evaluations, self.effort = problem, fixed, 0, 0.0
        self._judge = judge
        self._known: dict[Policy, float] = {}
        self._budgets = problem.hardware.budgets()
        self._parts: dict[Policy, tuple[float, float]] = {}
        arch = problem.arch
        bytes_before, slack = residency(arch, fixed.expert_order).prefix_bytes, unit_slack_bytes(arch)
        # What the first so many units take on the GPU, and in host memory.
        self._on_gpu = [
            arch.computed_bytes(size, problem.dtype_bytes) + count * slack for count, size in enumerate(bytes_before)
        ]
        self._on_cpu = [size + count * slack for count, size in enumerate(bytes_before)]
        self._percent = [100 * size / bytes_before[-1] for size in bytes_before]
        self._cache_is_fixed = fixed.cache_gpu_percent is not None or fixed.cache_cpu_percent is not None
        self._block_bytes = arch.kv_page_bytes(PAGE_TOKENS, problem.dtype_bytes, compressed=fixed.compress_cache)

    def tokens_per_s(self, policy: Policy) -> float:
        """What the judge says; 0 where the policy does not fit."""
        if policy not in self._known:
            self.evaluations += 1
            self.effort += 1 + policy.num_gpu_batches / _BATCHES
            try:
                self._known[policy] = self._judge(self.problem, policy)
            except InfeasibleError:
                self._known[policy] = 0.0
        return self._known[policy]

    @property
    def evaluated(self) -> list[Policy]:
        """All policies that fit, in the order in which they were evaluated."""
        return [policy for policy, tokens_per_s in self._known.items() if tokens_per_s]

    def with_units(self, policy: Policy, gpu_end: int, cpu_end: int) -> Policy:
        """The policy with the first units in residency order on the GPU, and those up to ``cpu_end`` in host memory."""
        last = len(self._percent) - 1
        gpu_end = min(max(gpu_end, 0), last)
        gpu, both = self._percent[gpu_end], self._percent[min(max(cpu_end, gpu_end), last)]
        return replace(policy, w_gpu_percent=gpu, w_cpu_percent=max(0.0, min(both, 100.0) - gpu))

    def spare_bytes(self, policy: Policy) -> tuple[Allocation, dict[str, int]]:
        """Counts, and bytes left by budget; negative is what is missing."""
        self.effort += _EFFORT_OF_BYTES
        allocation, memory = self.problem.sized(policy)
        return allocation, self._spare(memory)

    def _spare(self, memory: MemoryPlan) -> dict[str, int]:
        used = {tier: memory.total(tier) for tier in TIERS}
        budgets = self._budgets.items()
        return {name: size - sum(used[t] for t in name.split("+")) for name, size in budgets if size is not None}

    def with_kv_in_spare(self, policy: Policy) -> Policy | None:
        """The policy with as much of its host KV on the GPU as has room there; None where there is no room, or no such KV."""
        if self._cache_is_fixed:
            return None
        allocation, spare = self.spare_bytes(policy)
        pages, room = allocation.kv_pages, spare.get("gpu", 0) // self._block_bytes
        filled, moved, beyond = policy, 0, allocation.kv_pages["cpu"] + 1
        # What stages the KV of host memory shrinks with it; once all is gone, other buffers may grow.
        for _ in range(_TRIES):
            more = min(room, beyond - moved - 1)
            if more <= 0:
                break
            tried = _with_kv_moved(policy, pages, moved + more)
            left = self.spare_bytes(tried)[1]["gpu"] // self._block_bytes
            if left < 0:
                beyond = moved + more
            else:
                filled, moved, room = tried, moved + more, left
        return filled if filled != policy else None

    def with_unit_for_kv(self, policy: Policy) -> Policy | None:
        """The policy with one more unit on the GPU in the place of as little KV as that takes; None where none would do."""
        ends = self._ends(policy)
        if self._cache_is_fixed or self.fixed.w_gpu_percent is not None or ends[0] == len(self._on_gpu) - 1:
            return None
        traded = self.with_units(policy, ends[0] + 1, max(ends[0] + 1, ends[1]))
        for _ in range(_TRIES):  # what stages the KV of host memory grows with it
            allocation, spare = self.spare_bytes(traded)
            lacking = -(spare.get("gpu", 0) // self._block_bytes)
            if lacking <= 0:
                return self.with_kv_in_spare(traded) or traded
            if lacking > allocation.kv_pages["gpu"]:
                break
            traded = _with_kv_moved(traded, allocation.kv_pages, -lacking)
        return None

    def with_parts_of_units(self, policy: Policy) -> Callable[[Policy], float]:
        """What policies near the given one would give if weight units could be cut: spare bytes count as their part of the next.

        Room for a unit often takes several changes, of rows, pace and KV at once, of which none gains before the last.
        """
        gpu_end, cpu_end = self._ends(policy)
        more = ((gpu_end + 1, max(cpu_end, gpu_end + 1)), (gpu_end, cpu_end + 1))
        now = self._in_any_memory(policy)
        gpu_gain, cpu_gain = (max(0.0, self._in_any_memory(self.with_units(policy, *ends)) / now - 1) for ends in more)

        def tokens_per_s(tried: Policy) -> float:
            on_gpu, on_cpu = self._parts_of_next(tried)
            return self.tokens_per_s(tried) * (1 + gpu_gain * on_gpu + cpu_gain * on_cpu)

        return tokens_per_s

    def _ends(self, policy: Policy) -> tuple[int, int]:
        placement = self.problem.sized(policy)[0].placement
        return placement.gpu_end, placement.cpu_end

    def _in_any_memory(self, policy: Policy) -> float:
        """What `predict` says, whether the policy fits or not."""
        self.evaluations += 1
        self.effort += 1 + policy.num_gpu_batches / _BATCHES
        return predict(self.problem, policy, ignore_memory=True).tokens_per_s

    def _parts_of_next(self, policy: Policy) -> tuple[float, float]:
        """The part of the next unit's bytes that is spare, on the GPU and in host memory; 0 where what is there is fixed."""
        if policy not in self._parts:
            gpu_end, cpu_end = self._ends(policy)
            spare = self._spare(self.problem.sized(policy)[1])
            gpu, cpu, both = (spare.get(name, _NO_LIMIT) for name in ("gpu", "cpu", "gpu+cpu"))
            # A unit that moves up from host memory takes nothing more of what both tiers share.
            on_gpu = _part_of_next(self._on_gpu, gpu_end, gpu if cpu_end > gpu_end else min(gpu, both))
            on_cpu = _part_of_next(self._on_cpu, cpu_end, min(cpu, both))
            fixed = self.fixed.w_gpu_percent is not None, self.fixed.w_cpu_percent is not None
            self._parts[policy] = 0.0 if fixed[0] else on_gpu, 0.0 if fixed[1] else on_cpu
        return self._parts[policy]

    def fitted(self, policy: Policy | None) -> Policy | None:
        """The policy with its weights in the fastest tiers that hold them; KV moves down where it is too much.

        None where it does not fit by these two means. What the user has fixed stays.
        """
        if policy is None:
            return None
        policy = self.fixed.applied(policy)
        for _ in range(_TRIES):
            allocation, spare = self.spare_bytes(policy)
            better = self._refitted(policy, allocation, spare)
            if better is None or better == policy:
                break
            policy = better
        if better == policy and min(spare.values(), default=0) >= 0:
            return policy
        return self._trimmed(policy) if better is not None else None

    def _trimmed(self, policy: Policy) -> Policy | None:
        """The policy with a few units fewer: rounding may leave one too many."""
        for units in range(1, _TRIES):
            allocation, spare = self.spare_bytes(policy)
            lacking = [name for name, size in spare.items() if size < 0]
            if not lacking:
                return policy
            gpu_end, cpu_end = allocation.placement.gpu_end, allocation.placement.cpu_end
            if "gpu" in lacking or cpu_end == gpu_end:
                gpu_end -= units
            if "gpu" not in lacking or "cpu" in lacking:
                cpu_end -= units
            policy = self.fixed.applied(self.with_units(policy, gpu_end, max(gpu_end, cpu_end)))
        return None

    def _refitted(self, policy: Policy, allocation: Allocation, spare: dict[str, int]) -> Policy | None:
        shared = "gpu+cpu" in spare
        gpu_end, cpu_end = allocation.placement.gpu_end, allocation.placement.cpu_end
        host_weights = self._on_cpu[cpu_end] - self._on_cpu[gpu_end]
        gpu_room = self._on_gpu[gpu_end] + spare.get("gpu", _NO_LIMIT)
        cpu_room = host_weights + spare.get("cpu", _NO_LIMIT)
        if shared:
            gpu_room = min(gpu_room, self._on_gpu[gpu_end] + host_weights + spare["gpu+cpu"])
        new_gpu = max(0, bisect_right(self._on_gpu, gpu_room) - 1)
        if self.fixed.w_gpu_percent is not None:
            new_gpu = gpu_end
        elif shared and cpu_end > gpu_end == 0:  # as a move wants it: what is never loaded needs no buffers for that
            new_gpu = 0
        if shared:
            grown = self._on_gpu[new_gpu] - self._on_gpu[gpu_end]
            cpu_room = min(cpu_room, host_weights + spare["gpu+cpu"] - grown)
        new_cpu = max(new_gpu, bisect_right(self._on_cpu, self._on_cpu[new_gpu] + max(0, cpu_room)) - 1)
        if self.fixed.w_cpu_percent is not None:
            new_cpu = min(new_gpu + cpu_end - gpu_end, len(self._on_cpu) - 1)
        if (new_gpu, new_cpu) != (gpu_end, cpu_end):
            policy = self.fixed.applied(self.with_units(policy, new_gpu, new_cpu))
        gpu_lacks = max(0, self._on_gpu[new_gpu] - gpu_room)
        cpu_lacks = max(0, self._on_cpu[new_cpu] - self._on_cpu[new_gpu] - cpu_room)
        if not (gpu_lacks or cpu_lacks):
            return policy
        return self._kv_moved_down(policy, allocation, gpu_lacks, cpu_lacks, shared)

    def _kv_moved_down(
        self, policy: Policy, allocation: Allocation, gpu_bytes: int, cpu_bytes: int, shared: bool
    ) -> Policy | None:
        blocks = dict(allocation.kv_pages)
        total = sum(blocks.values())
        from_gpu, from_cpu = (-(-size // self._block_bytes) for size in (gpu_bytes, cpu_bytes))
        if shared and from_gpu + from_cpu:  # both are host memory, and only the disk is another one
            from_cpu = min(from_gpu + from_cpu, blocks["cpu"])
            from_gpu = max(0, -(-max(gpu_bytes, cpu_bytes) // self._block_bytes) - from_cpu)
        if from_gpu > blocks["gpu"] or from_cpu > blocks["cpu"]:
            return None
        to_cpu = 0 if shared else from_gpu
        moved = with_shares(
            policy, "cache", 100 * (blocks["gpu"] - from_gpu) / total, 100 * (blocks["cpu"] - from_cpu + to_cpu) / total
        )
        return self.fixed.applied(moved)


def _with_kv_moved(policy: Policy, pages: Mapping[str, int], moved: int) -> Policy:
    """The policy with so many pages more on the GPU, from host memory; negative is the other way."""
    total = sum(pages.values())
    return with_shares(policy, "cache", 100 * (pages["gpu"] + moved) / total, 100 * (pages["cpu"] - moved) / total)


def _part_of_next(prefix_bytes: Sequence[int], units: int, spare: int) -> float:
    """The part of the bytes of the unit after the first so many that is spare; 0 where there is no more unit."""
    if units == len(prefix_bytes) - 1:
        return 0.0
    return min(1.0, max(0, spare) / (prefix_bytes[units + 1] - prefix_bytes[units]))
