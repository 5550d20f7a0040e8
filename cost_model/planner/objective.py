"""Candidates are judged here: tokens per second of a policy, and the policy that uses what memory is left."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from math import ceil

from cost_model.memory.allocation import PAGE_TOKENS, Allocation, residency
from cost_model.model.weight_units import unit_slack_bytes
from cost_model.planner.constraints import Fixed
from cost_model.timing.evaluate import predict
from cost_model.timing.problem import Problem
from policies.common.errors import InfeasibleError
from policies.placement import TIERS
from policies.policy import Policy

_NO_LIMIT = 1 << 62
_TRIES = 4
#: So many GPU batches take as long to judge as all the rest.
_BATCHES = 15


class Judge:
    """Judges each policy once.

    Args:
        problem: what is planned.
        fixed: what the user has decided; every settled policy has it.

    Attributes:
        evaluations: policies that were judged.
        effort: time taken, in judgements of a policy with few GPU batches; it does not depend on the clock.
    """

    def __init__(self, problem: Problem, fixed: Fixed):
        self.problem, self.fixed, self.evaluations, self.effort = problem, fixed, 0, 0.0
        self._judged: dict[Policy, float] = {}
        self._budgets = problem.hardware.budgets()
        arch = problem.arch
        bytes_before, slack = residency(arch, fixed.expert_order).prefix_bytes, unit_slack_bytes(arch)
        # What the first so many units take on the GPU, and in host memory.
        self._on_gpu = [
            size // arch.dtype_bytes * problem.dtype_bytes + count * slack for count, size in enumerate(bytes_before)
        ]
        self._on_cpu = [size + count * slack for count, size in enumerate(bytes_before)]
        self._percent = [100 * size / bytes_before[-1] for size in bytes_before]
        self._block_bytes = arch.kv_bytes_per_token(problem.dtype_bytes) * PAGE_TOKENS

    def tokens_per_s(self, policy: Policy | None) -> float:
        """What `predict` says; 0 where the policy does not fit, or there is none."""
        if policy is None:
            return 0.0
        if policy not in self._judged:
            self.evaluations += 1
            self.effort += 1 + policy.num_gpu_batches / _BATCHES
            try:
                self._judged[policy] = predict(self.problem, policy).tokens_per_s
            except InfeasibleError:
                self._judged[policy] = 0.0
        return self._judged[policy]

    def with_units(self, policy: Policy, gpu_end: int, cpu_end: int) -> Policy:
        """The policy with the first units in residency order on the GPU, and those up to ``cpu_end`` in host memory."""
        last = len(self._percent) - 1
        gpu_end = min(max(gpu_end, 0), last)
        gpu, both = self._percent[gpu_end], self._percent[min(max(cpu_end, gpu_end), last)]
        return replace(policy, w_gpu_percent=gpu, w_cpu_percent=max(0.0, min(both, 100.0) - gpu))

    def spare_bytes(self, policy: Policy) -> tuple[Allocation, dict[str, int]]:
        """Counts, and bytes left by budget; negative is what is missing."""
        self.effort += 0.3
        allocation = self.problem.allocate(policy)
        memory = self.problem.memory(policy, allocation)
        used = {tier: memory.total(tier) for tier in TIERS}
        budgets = self._budgets.items()
        return allocation, {
            name: size - sum(used[t] for t in name.split("+")) for name, size in budgets if size is not None
        }

    def settled(self, policy: Policy | None) -> Policy | None:
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

    def slowed(self, policy: Policy | None) -> Policy | None:
        """The policy settled with fewer tokens of prompts a sweep, by as many as the device lacks bytes for."""
        if policy is None or self.fixed.prefill_tokens is not None:
            return None
        bare = self.fixed.applied(replace(policy, w_gpu_percent=0.0))
        tokens = policy.prefill_tokens
        half = replace(bare, prefill_tokens=max(1, tokens // 2))
        name = "gpu" if "gpu" in self._budgets and self._budgets["gpu"] is not None else "gpu+cpu"
        lacking, less = (-self.spare_bytes(each)[1][name] for each in (bare, half))
        per_token = (lacking - less) / max(1, tokens - half.prefill_tokens)
        fewer = ceil(lacking / per_token) if per_token > 0 else tokens
        return self.settled(replace(policy, prefill_tokens=tokens - fewer)) if 0 < fewer < tokens else None

    def _trimmed(self, policy: Policy) -> Policy | None:
        """Rounding may leave a unit too many."""
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
        moved = with_cache(
            policy, 100 * (blocks["gpu"] - from_gpu) / total, 100 * (blocks["cpu"] - from_cpu + to_cpu) / total
        )
        return self.fixed.applied(moved)


def with_cache(policy: Policy, gpu_percent: float, cpu_percent: float, **changes) -> Policy:
    """The policy with other shares of the KV cache, cut to what a policy may hold."""
    gpu = min(100.0, max(0.0, gpu_percent))
    return replace(policy, cache_gpu_percent=gpu, cache_cpu_percent=min(100.0 - gpu, max(0.0, cpu_percent)), **changes)
