"""The planner's policy within the budgets of a capped process, and the limit of that policy's own bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from cost_model.planner.constraints import Fixed
from cost_model.planner.solve import solve
from cost_model.timing.evaluate import Prediction
from cost_model.timing.phase_loads import mode_shares
from policies.policy import Policy, Workload
from scripts.gpu.limit import Limit, Rates, steady_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes that may be taken.

    Args:
        gpu_bytes: for tensors, what context and allocator need already taken off.
        host_bytes: for the ``cpu`` tier.
        disk_bytes: for the ``disk`` tier.
    """

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int

    def of(self, hardware: Hardware) -> Hardware:
        """The machine with no more than this."""
        gpu = replace(hardware.gpu, memory_bytes=self.gpu_bytes, reserved_bytes=0)
        host = "host_memory_bytes" if hardware.device == "cuda" else "cpu_budget_bytes"
        return replace(hardware, gpus=(gpu,), disk_bytes=self.disk_bytes, **{host: self.host_bytes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A policy that fits, what is expected of it, and the limit of its own bytes."""

    policy: Policy
    prediction: Prediction
    limit: Limit

    @property
    def rows(self) -> int:
        """Rows in flight in the steady state: at the pace of its admission a block may never be full."""
        return min(self.policy.block_size, max(1, round(self.prediction.rows_in_flight)))


def plan(arch: ModelArch, workload: Workload, hardware: Hardware, budget: Budget, rates: Rates) -> Planned:
    """The planner's rolling policy for a job without end.

    Args:
        hardware: the measured machine.
        rates: those of the limit.

    Raises:
        InfeasibleError: nothing fits.
    """
    found = solve(arch, budget.of(hardware), workload, fixed=Fixed(schedule="rolling"))
    return Planned(
        policy=found.policy,
        prediction=found.prediction,
        limit=own_limit(arch, workload, rates, found.policy, found.prediction),
    )


def own_limit(arch: ModelArch, workload: Workload, rates: Rates, policy: Policy, prediction: Prediction) -> Limit:
    """The overlapped limit with the bytes that the policy moves; of the embedding only rows are read."""
    tier_of = prediction.allocation.placement.tier_of
    moved = [unit for unit in units_of(arch) if unit.kind != "embed" and tier_of[unit.id] != "gpu"]
    return steady_limit(
        arch,
        workload,
        rates,
        rows=prediction.rows_in_flight,
        w_streamed=sum(unit.stored_bytes for unit in moved),
        w_on_disk=sum(unit.stored_bytes for unit in moved if tier_of[unit.id] == "disk"),
        kv_shares=mode_shares(policy, prediction.allocation, policy.block_size),
    )
