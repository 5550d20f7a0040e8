"""`--policy auto`: measure the machine (once), plan for the job's own lengths; and what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cost_model import Hardware, ModelArch, Workload
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.simulate import Simulation, simulate
from policies.policy import Policy

#: Of the host memory and disk space that are free now; the rest is for the process itself and for others.
_SHARE_TO_TAKE = 0.9


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
        hardware: str | Path,
        device: str,
        directory: Path,
        budgets: Mapping[str, float | None],
        held_bytes: int = 0,
        usage: ExpertUsage | None = None,
        on_demand: bool = True,
    ) -> Forecaster:
        """For this machine, measured now or before (``hardware`` "auto"), or from a file of `python -m flexmoe.probe`.

        Args:
            directory: on the disk that the disk tier lives on.
            budgets: GiB of ``gpu_mem``, ``cpu_mem`` and ``nvme_mem``; None is what the machine has, less a tenth.
            held_bytes: of the compute device's memory, not for what the planner places.

        Raises:
            FlexMoEError: it cannot be measured, or the file cannot be used.
        """
        if str(hardware) == "auto":
            from flexmoe.probing.cache import cached_probe

            machine = cached_probe(device, directory)
        else:
            machine = Hardware.load(hardware)
        machine = replace(
            machine,
            host_memory_bytes=int(_SHARE_TO_TAKE * machine.host_memory_bytes),
            disk_bytes=int(_SHARE_TO_TAKE * machine.disk_bytes),
        )
        machine = machine.with_budgets(**budgets)
        if held_bytes:
            gpu = replace(machine.gpu, memory_bytes=max(0, machine.gpu.memory_bytes - held_bytes))
            machine = replace(machine, gpus=(gpu,))
        about = {"dtype_bytes": dtype.itemsize, "usage": usage, "on_demand": on_demand}
        return cls(arch=arch, hardware=machine, workload=workload, **about)

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

    def _about(self, kv_tokens: int | None) -> dict:
        return {
            "dtype_bytes": self.dtype_bytes,
            "kv_tokens": kv_tokens,
            "usage": self.usage,
            "on_demand": self.on_demand,
        }


def describe_policy(policy: Policy) -> str:
    """The policy in one line, in the flags that would give it."""
    p = policy
    shares = (
        p.w_gpu_percent,
        p.w_cpu_percent,
        p.cache_gpu_percent,
        p.cache_cpu_percent,
        p.act_gpu_percent,
        p.act_cpu_percent,
    )
    percents = " ".join(f"{share:.2f}".rstrip("0").rstrip(".") for share in shares)
    return (
        f"policy: --gpu-batch-size {p.gpu_batch_size} --num-gpu-batches {p.num_gpu_batches} --percent {percents} "
        f"--schedule {p.schedule} --prefill-tokens {p.prefill_tokens}, CPU attention {p.cpu_attention_percent:g} %"
        + (", most used experts first" if p.expert_order else "")
    )


def forecast_line(predicted: Simulation) -> str:
    """One line before the run."""
    hours = f" ({predicted.job_s / 3600:.2f} h)" if predicted.job_s >= 600 else ""
    return f"predicted: {predicted.tokens_per_s:.2f} generated token/s, {predicted.job_s:.1f} s{hours}"


def predicted_metrics(predicted: Simulation) -> dict:
    """The prediction by the names that the measured values have in ``--metrics-json``."""
    return {
        "wall_s": predicted.job_s,
        "generated_tokens_per_s": predicted.tokens_per_s,
        "sweeps": predicted.sweeps,
        "lanes": {lane: {"active_s": seconds} for lane, seconds in sorted(predicted.lanes_s.items())},
        "peak_bytes": {tier: predicted.memory.total(tier) for tier in predicted.memory.parts},
    }


def comparison_lines(predicted: Simulation, metrics: dict) -> list[str]:
    """Predicted against measured, whole job and per lane; a lane counts while at least one of its workers is busy."""
    measured_s = metrics["wall_s"]
    off = 100 * (predicted.job_s / measured_s - 1) if measured_s else 0.0
    lanes = [
        f"{lane} {predicted.lanes_s.get(lane, 0.0):.2f}/{metrics['lanes'].get(lane, {}).get('active_s', 0.0):.2f}"
        for lane in sorted({*predicted.lanes_s, *metrics["lanes"]})
    ]
    return [
        f"predicted/measured: {predicted.job_s:.2f}/{measured_s:.2f} s, the prediction is off by {off:+.1f} %",
        f"predicted/measured busy seconds: {', '.join(lanes)}",
    ]
