"""Writes the policies that ship with the package: `policies/presets/<machine>/<model>-<prompt>-<completion>.json`.

    python -m scripts.make_policies             # all of them
    python -m scripts.make_policies MODEL …     # those of some models

They are planned with the rates of `cost_model/hardware/machines` (datasheets and estimates), for jobs without end whose rows are
all alike. No machine has all of its nominal memory free: of host memory `HOST_SHARE` is planned with, and the file's
section "hardware" holds what that leaves; of GPU memory what the context takes and what the allocator cannot give back
is left alone. A plan for a measured machine and the job's own rows (`--policy auto`) knows better.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import policies
from cost_model.cli.report import Report
from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.planner.solve import Plan, solve
from policies.common.memory_units import GIB
from policies.policy import PolicyFile
from policies.workload import Workload

POLICIES = Path(policies.__file__).parent / "presets"
HOST_SHARE = 0.93
#: Planned for every common machine and job, and for consumer cards of 24 GB and one job.
MODELS = ("mixtral-8x7b",)
MODELS_OF_24_GB = ("gpt-oss-120b", "qwen3-30b-a3b", "qwen3-235b-a22b", "glm-4.5-air")
WORKLOADS = (
    Workload(prompt_len=512, gen_len=32),
    Workload(prompt_len=512, gen_len=256),
    Workload(prompt_len=77, gen_len=128),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A common machine: a preset's rates with a nominal host memory and, where given, another disk; sizes in GiB."""

    preset: str
    host_gib: int
    disk_gib: int | None = 1500

    @property
    def name(self) -> str:
        """The directory of its policies."""
        return f"{self.preset}-{self.host_gib}gb"

    def hardware(self) -> Hardware:
        """What the policies are planned for."""
        preset, usable = Hardware.preset(self.preset), int(HOST_SHARE * self.host_gib * GIB)
        hardware = replace(
            preset,
            name=f"{preset.name}, {HOST_SHARE:.0%} of {self.host_gib} GiB of host memory",
            host_memory_bytes=usable,
            disk_bytes=preset.disk_bytes if self.disk_gib is None else self.disk_gib * GIB,
        )
        if hardware.device == "cpu":  # the gpu tier is host memory too
            return replace(hardware, gpus=(replace(hardware.gpu, memory_bytes=usable),))
        return hardware


MACHINES = (
    Machine(preset="t4", host_gib=192),
    Machine(preset="l4", host_gib=192),
    Machine(preset="rtx3090", host_gib=128),
    Machine(preset="rtx4090", host_gib=128),
    Machine(preset="a5000", host_gib=512),
    Machine(preset="cpu", host_gib=32, disk_gib=None),
)


MACHINES_OF_24_GB = (Machine(preset="rtx4090", host_gib=64), Machine(preset="rtx4090", host_gib=128))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """One ready policy: a model on a machine for a job."""

    machine: Machine
    model: str
    workload: Workload

    @property
    def path(self) -> Path:
        """Its file, below the directory of all policies."""
        return Path(self.machine.name, f"{self.model}-{self.workload.prompt_len}-{self.workload.gen_len}.json")

    def plan(self) -> Plan:
        """The planner's answer."""
        return solve(ModelArch.from_name(self.model), self.machine.hardware(), self.workload)

    def file(self, plan: Plan) -> PolicyFile:
        """The file that carries the plan."""
        arch = ModelArch.from_name(self.model)
        return Report(
            arch=arch,
            hardware=self.machine.hardware(),
            workload=self.workload,
            dtype_bytes=arch.dtype_bytes,
            origin=f"preset {self.machine.preset}",
            policy=plan.policy,
            prediction=plan.prediction,
            explanation=plan.explanation,
        ).policy_file()


def all_ready() -> list[Ready]:
    """Every policy that ships with the package."""
    every = (*product(MACHINES, MODELS, WORKLOADS), *product(MACHINES_OF_24_GB, MODELS_OF_24_GB, WORKLOADS[1:2]))
    return [Ready(machine=machine, model=model, workload=workload) for machine, model, workload in every]


def write_all(directory: Path, models: Sequence[str] = ()) -> None:
    """Plans and writes each policy, or those of some models, and prints it in one line."""
    for ready in all_ready():
        if models and ready.model not in models:
            continue
        plan = ready.plan()
        path = directory / ready.path
        path.parent.mkdir(parents=True, exist_ok=True)
        ready.file(plan).save(path)
        print(f"{ready.path!s:<42} {summary(plan)}", flush=True)


def summary(plan: Plan) -> str:
    """Tokens per second, and what the policy is, in one line."""
    p = plan.policy
    pairs = (("w", "weights"), ("cache", "KV"), ("act", "activations"))
    shares = ", ".join(
        f"{what} {getattr(p, f'{stem}_gpu_percent'):.1f}/{getattr(p, f'{stem}_cpu_percent'):.1f}"
        for stem, what in pairs
    )
    return (
        f"{plan.prediction.tokens_per_s:7.1f} tokens/s: {p.schedule}, {p.num_gpu_batches} x {p.gpu_batch_size} rows, "
        f"{shares}, CPU attention {p.cpu_attention_percent:.0f}, prefill {p.prefill_tokens}; {plan.prediction.bottleneck}"
    )


if __name__ == "__main__":
    write_all(POLICIES, sys.argv[1:])
    sys.exit(0)
