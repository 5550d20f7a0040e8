"""`--policy auto`: measure the machine (once), and plan for the job's own lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cost_model import Hardware, ModelArch, Workload
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.simulate import Simulation, simulate
from flexmoe.planning.machine import this_machine
from policies.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecaster:
    """The planner's view of one job: predicts any policy for it, and finds one.

    Args:
        arch, hardware, workload: the model on the machine for the job.
        dtype_bytes: bytes of one number in the compute dtype.
        usage: how often each expert was chosen in another run; None: all are alike.
        on_demand: sweeps of few rows move only the experts that were routed to.
    """

    arch: ModelArch
    hardware: Hardware
    workload: Workload
    dtype_bytes: int
    usage: ExpertUsage | None = None
    on_demand: bool = True

    @classmethod
    def of_machine(
        cls,
        arch: ModelArch,
        workload: Workload,
        dtype: torch.dtype,
        *,
        hardware: Hardware | str | Path,
        device: str,
        directory: Path,
        budgets: Mapping[str, float | None],
        held_bytes: int = 0,
        usage: ExpertUsage | None = None,
        on_demand: bool = True,
    ) -> Forecaster:
        """For this machine, measured now or before (``hardware`` "auto"), or with rates that are given: a file of
        `python -m flexmoe.probe`, or its content.

        Args:
            directory: on the disk that the disk tier lives on.
            budgets: GiB of ``gpu_mem``, ``cpu_mem`` and ``nvme_mem``; None is what the machine has, less a tenth.
            held_bytes: of the compute device's memory, not for what the planner places.

        Raises:
            FlexMoEError: it cannot be measured, or the file cannot be used.
        """
        machine = this_machine(hardware, device=device, directory=directory, budgets=budgets, held_bytes=held_bytes)
        return cls(
            arch=arch,
            hardware=machine,
            workload=workload,
            dtype_bytes=dtype.itemsize,
            usage=usage,
            on_demand=on_demand,
        )

    def plan(self, kv_tokens: int | None = None) -> Policy:
        """The best policy for the job.

        Args:
            kv_tokens: KV capacity over all tiers; default: what keeps the block in flight.

        Raises:
            InfeasibleError: none fits; the sentence names what binds and the cheapest way out.
        """
        from cost_model import solve

        return solve(self.arch, self.hardware, self.workload, advice=False, **self._about(kv_tokens)).policy

    def predict(self, policy: Policy, kv_tokens: int | None = None, cache_experts: int = 0) -> Simulation:
        """What the job will do under a policy.

        Args:
            cache_experts: experts that the run keeps in device memory beyond what the policy takes.
        """
        about = self._about(kv_tokens) | {"cache_experts": cache_experts}
        return simulate(self.arch, self.hardware, self.workload, policy, **about)

    def _about(self, kv_tokens: int | None) -> dict[str, Any]:
        return {
            "dtype_bytes": self.dtype_bytes,
            "kv_tokens": kv_tokens,
            "usage": self.usage,
            "on_demand": self.on_demand,
        }
