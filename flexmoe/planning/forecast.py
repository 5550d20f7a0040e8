"""The planner for one job on this machine, which is measured once: what it will do under a policy, and the best policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cost_model import Hardware, ModelArch, Workload
from cost_model.hardware.speeds import with_speeds
from cost_model.planner.constraints import Fixed
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.simulate import Simulation, simulate
from cost_model.timing.evaluate import evaluate
from flexmoe.errors import InfeasibleError
from flexmoe.planning import kept_plans
from flexmoe.planning.drift import COMPUTE, DISK
from flexmoe.planning.machine import this_machine
from policies.policy import Policy, PolicyFile


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
            budgets: GiB of ``gpu_mem``, ``cpu_mem``, ``nvme_mem`` and ``memory_limit``; None is what the machine has, less a
                tenth.
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

    def plan(self, kv_tokens: int | None = None, fixed: Fixed | None = None) -> Policy:
        """The best policy for the job, which is kept: the same job on the same machine is planned once.

        Args:
            kv_tokens: KV capacity over all tiers; default: what keeps the block in flight.
            fixed: fields of the policy that are decided already.

        Raises:
            InfeasibleError: none fits; the sentence names what binds and the cheapest way out.
        """
        fixed = fixed or Fixed()
        capacities = {tier: size for tier, size in self.hardware.budgets().items() if size is not None}
        key = kept_plans.key_of(self._circumstances(kv_tokens, fixed))
        kept = kept_plans.find(key, capacities)
        if kept is not None and self._fits(kept.policy, kv_tokens):
            return kept.policy
        from cost_model import solve

        policy = solve(self.arch, self.hardware, self.workload, fixed=fixed, **self._about(kv_tokens)).policy
        kept_plans.keep(key, self.policy_file(policy), capacities)
        return policy

    def at_speeds(self, speeds: Mapping[str, float]) -> Forecaster:
        """The same on this machine where some lanes are so many times as fast as measured.

        Args:
            speeds: by lane, `DISK` or `COMPUTE` of `flexmoe.planning.drift`.
        """
        changed = {name: speeds[lane] for lane, name in ((DISK, "disk_read"), (COMPUTE, "compute")) if lane in speeds}
        return replace(self, hardware=with_speeds(self.hardware, **changed))

    def policy_file(self, policy: Policy) -> PolicyFile:
        """A policy with what it was made for."""
        return PolicyFile(
            policy=policy,
            model=self.arch.fingerprint(),
            hardware=self.hardware.fingerprint(),
            workload=self.workload.to_json(),
        )

    def advice(self, tokens_per_s: float, kv_tokens: int | None = None, fixed: Fixed | None = None) -> tuple[str, ...]:
        """What would help most, a phrase each, best first: the planner's report has the same. It takes longer than `plan`.

        Args:
            tokens_per_s: generated tokens per second that are predicted now.
            kv_tokens, fixed: as for `plan`.
        """
        from cost_model import solve

        about = self._about(kv_tokens)
        found = solve(self.arch, self.hardware, self.workload, fixed=fixed or Fixed(), advice=True, **about)
        return tuple(each.describe(tokens_per_s) for each in found.explanation.advice)

    def predict(self, policy: Policy, kv_tokens: int | None = None, cache_experts: int = 0) -> Simulation:
        """What the job will do under a policy.

        Args:
            cache_experts: experts that the run keeps in device memory beyond what the policy takes.
        """
        about = self._about(kv_tokens) | {"cache_experts": cache_experts}
        return simulate(self.arch, self.hardware, self.workload, policy, **about)

    def _fits(self, policy: Policy, kv_tokens: int | None) -> bool:
        try:
            evaluate(self.arch, self.hardware, self.workload, policy, **self._about(kv_tokens))
        except InfeasibleError:
            return False
        return True

    def _circumstances(self, kv_tokens: int | None, fixed: Fixed) -> dict[str, Any]:
        """What a plan follows from, as JSON values; capacities are left out, which change from start to start."""
        rates = replace(
            self.hardware,
            gpus=(replace(self.hardware.gpu, memory_bytes=1),),
            host_memory_bytes=1,
            disk_bytes=1,
            cpu_budget_bytes=None,
            process_bytes=0,
            sources={},
        )
        usage = self.usage and {"tokens": self.usage.tokens, "counts": self.usage.counts.tolist()}
        return {
            "model": asdict(self.arch),
            "machine": rates.to_json(),
            "job": self.workload.to_json(),
            "fixed": fixed.given,
            "about": self._about(kv_tokens) | {"usage": usage},
        }

    def _about(self, kv_tokens: int | None) -> dict[str, Any]:
        return {
            "dtype_bytes": self.dtype_bytes,
            "kv_tokens": kv_tokens,
            "usage": self.usage,
            "on_demand": self.on_demand,
        }
