"""What is to be planned or judged: a model on a machine for a job; the allocation, bytes and durations of a policy there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cost_model.hardware.hardware import Hardware
from cost_model.memory.allocation import Allocation, allocate
from cost_model.memory.memory_plan import MemoryPlan, plan_memory
from cost_model.model.arch import ModelArch
from cost_model.timing.op_costs import Costs
from policies.policy import Policy
from policies.workload import Workload

if TYPE_CHECKING:
    import numpy as np

    from cost_model.routing.expert_usage import ExpertUsage

#: Policies whose bytes are kept.
_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A model on a machine for a job.

    Args:
        arch, hardware, workload: those.
        dtype_bytes: bytes of one number in the compute dtype.
        kv_tokens: KV capacity over all tiers; None: what keeps the block in flight.
        shares: ``[layers, E]``, the probability that a token is routed to an expert; None: all are alike.
        on_demand: sweeps of few rows move only the experts that were routed to.
        cache_experts: experts that device memory beyond what a policy takes holds.
    """

    arch: ModelArch
    hardware: Hardware
    workload: Workload
    dtype_bytes: int
    kv_tokens: int | None = None
    shares: np.ndarray | None = field(default=None, compare=False)
    on_demand: bool = True
    cache_experts: int = 0
    _sized: dict[Policy, tuple[Allocation, MemoryPlan]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(
        cls,
        arch: ModelArch,
        hardware: Hardware,
        workload: Workload,
        *,
        dtype_bytes: int | None = None,
        kv_tokens: int | None = None,
        usage: ExpertUsage | None = None,
        on_demand: bool = True,
        cache_experts: int = 0,
    ) -> Problem:
        """The problem with what was left out.

        Args:
            dtype_bytes: default: as stored.
            usage: how often each expert was chosen; default: all alike.

        Raises:
            InfeasibleError: the usage is of another model.
        """
        if usage is not None:
            usage.check_model(arch)
        return cls(
            arch=arch,
            hardware=hardware,
            workload=workload,
            dtype_bytes=dtype_bytes or arch.dtype_bytes,
            shares=None if usage is None else usage.shares,
            kv_tokens=kv_tokens,
            on_demand=on_demand,
            cache_experts=cache_experts,
        )

    def allocate(self, policy: Policy) -> Allocation:
        """What a policy allocates."""
        p = self
        device, longest = p.hardware.device, p.workload.longest_row
        allocation = allocate(p.arch, policy, p.workload, device=device, kv_tokens=p.kv_tokens, longest_row=longest)
        return replace(allocation, cache_experts=p.cache_experts) if p.cache_experts else allocation

    def sized(self, policy: Policy) -> tuple[Allocation, MemoryPlan]:
        """What a policy allocates, and its bytes. A search that has fitted a policy to the memory evaluates it next, so those of
        the last few policies are kept."""
        found = self._sized.get(policy)
        if found is None:
            allocation = self.allocate(policy)
            found = allocation, self.memory(policy, allocation)
            if len(self._sized) >= _KEPT:
                self._sized.clear()
            self._sized[policy] = found
        return found

    def memory(self, policy: Policy, allocation: Allocation) -> MemoryPlan:
        """The bytes of a policy."""
        device = self.hardware.device
        return plan_memory(
            self.arch,
            policy,
            allocation,
            device=device,
            compute_bytes=self.dtype_bytes,
            process_bytes=self.hardware.process_bytes,
        )

    def costs(self, policy: Policy, allocation: Allocation) -> Costs:
        """The durations of a policy's operations."""
        arch = self.arch.grouped(policy.experts_per_unit)
        options = self.shares, self.on_demand, self.workload.scored_share
        return Costs(arch, self.hardware, policy, allocation, self.dtype_bytes, *options)
