"""What two half-blocks are worth: plans with one and with two, beside what no lane waiting for another one would give.

    python -m scripts.optimality.half_blocks [--cases A5000 …] [--output benchmarks/half-blocks]

For endless jobs of 512 + 256 tokens on preset machines it plans with `half_blocks` 1, with 2, and with the choice left to the
planner. *Lane-free* is the best policy of the same search by the same closed form without the bounds of the chain of
operations and of the slots: every lane works as if all that it needs were there. *Limit* is the physical one
(`scripts.gpu.limit`). The planner's choice is walked event by event, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cost_model.hardware.hardware import Hardware
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import group_on, units_of
from cost_model.planner.constraints import Fixed
from cost_model.planner.discrete import Choices, rounded
from cost_model.planner.objective import Objective
from cost_model.planner.search import ROUNDS, Climb
from cost_model.planner.solve import Plan, solve
from cost_model.simulation.replayed_phases import replayed_tokens_per_s
from cost_model.timing.job_phases import job_phases
from cost_model.timing.problem import Problem
from cost_model.timing.sweep_bounds import SweepForm
from policies.policy import Policy
from policies.workload import Workload
from scripts.gpu.limit import Rates, machine_limit

JOB = Workload(prompt_len=512, gen_len=256)
#: Name, model, preset machine.
CASES = (
    ("A5000", "mixtral-8x7b", "a5000"),
    ("L4", "mixtral-8x7b", "l4"),
    ("RTX 3090", "mixtral-8x7b", "rtx3090"),
    ("RTX 4090", "mixtral-8x7b", "rtx4090"),
    ("H100", "mixtral-8x7b", "h100"),
    ("Qwen3-30B on A5000", "qwen3-30b-a3b", "a5000"),
)
#: Part of the lane-free figure that is asked for, and how far the event walk may be from the closed form.
TARGET, AGREEMENT = 0.94, 0.05
#: Bounds of a sweep that are not of one lane or shared resource.
_WAITING = ("schedule", "slots", "on demand", "serial")
_HOST_SHARE = 0.95
#: As in `cost_model.planner.search`.
_KICKED_FROM = 4
OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "half-blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case, in generated tokens per second.

    Attributes:
        one, two, chosen: planned with so many half-blocks, and as the planner chooses; closed form.
        half_blocks: what it chose.
        walked: the chosen policy with its sweeps replayed event by event.
        lane_free, limit: as the module says.
        bound_by: what decides in the chosen plan.
        policy: the chosen one.
        seconds: that the choice took, and those that it took with one half-block.
    """

    case: str
    one: float
    two: float
    chosen: float
    half_blocks: int
    walked: float
    lane_free: float
    limit: float
    bound_by: str
    policy: dict
    seconds: tuple[float, float]

    @property
    def share(self) -> float:
        """Of the lane-free figure, which is the best by the closed form: the same of the three plans."""
        return max(self.one, self.two, self.chosen) / self.lane_free

    @property
    def walk_error(self) -> float:
        """Of the event walk, as a part of the closed form."""
        return self.walked / self.chosen - 1

    @property
    def met(self) -> bool:
        """Whether the case is as good as asked."""
        return self.share >= TARGET and abs(self.walk_error) <= AGREEMENT

    def line(self) -> str:
        """A row of the table."""
        return (
            f"| {self.case} | {self.one:.0f} | {self.two:.0f} | {self.half_blocks} | {self.chosen:.0f} | "
            f"{self.lane_free:.0f} | {100 * self.share:.1f} % | {100 * self.walk_error:+.1f} % | {self.limit:.0f} | "
            f"{self.bound_by} | {self.seconds[0]:.0f} ({self.seconds[1]:.0f}) |"
        )


def lane_free_tokens_per_s(problem: Problem, policy: Policy) -> float:
    """What a policy would give if nobody waited for another lane.

    Raises:
        InfeasibleError: a tier has too few bytes.
    """
    allocation = problem.allocate(policy)
    problem.memory(policy, allocation).check(problem.hardware.budgets())
    job = job_phases(policy, allocation, problem.workload)
    form = SweepForm(problem.costs(policy, allocation), policy.gpu_batch_size)
    seconds = 0.0
    for phase in job.phases:
        if phase.sweeps > 0:
            bounds = form.time(phase.load).bounds_s
            seconds += phase.sweeps * max(s for name, s in bounds.items() if name not in _WAITING)
    return job.tokens / seconds


def lane_free(problem: Problem, plans: Iterable[Policy]) -> float:
    """The most that the search finds when judged so: from the programmes, and from plans that were made with waiting."""
    fixed = Fixed()
    climb = Climb(Objective(problem, fixed, lane_free_tokens_per_s))
    relaxed = Choices(problem, fixed).run()
    starts = [climb.start(policy) for policy in (*plans, *(rounded(each, problem, fixed) for each in relaxed))]
    pool = climb.diverse(policy for policy in starts if policy is not None)
    for keep, effort in ROUNDS:
        pool = climb.ranked([*(climb.run(policy, effort) for policy in pool[:keep]), *pool[keep:]])
    return climb.objective.tokens_per_s(climb.kicked(pool[:_KICKED_FROM], effort=1.0))


def physical_limit(arch: ModelArch, hardware: Hardware) -> float:
    """Tokens per second of ANCHORS' formula at the preset's rates, all host KV attended on the CPU at the rate of its memory."""
    rates = hardware.gpu.experts[arch.dtype_bytes]
    best = map(max, zip(*rates.flops_per_s))
    return machine_limit(
        arch,
        JOB,
        Rates(
            pcie=hardware.gpu.h2d_bytes_per_s,
            host_dram=hardware.host_bytes_per_s,
            gpu_flops=tuple(zip(rates.tokens, best, strict=True)),
            nvme=hardware.disk_read_bytes_per_s,
        ),
        gpu_bytes=hardware.gpu.memory_bytes,
        host_bytes=_HOST_SHARE * hardware.host_memory_bytes,
        disk_bytes=hardware.disk_bytes,
        dense_bytes=sum(unit.stored_bytes for unit in units_of(arch) if unit.kind != "expert"),
    ).tokens_per_s


def measure(case: str, model: str, machine: str) -> Result:
    """One case."""
    arch, hardware = ModelArch.from_name(model), Hardware.preset(machine)
    plans: dict[int | None, Plan] = {
        halves: solve(arch, hardware, JOB, fixed=Fixed(half_blocks=halves)) for halves in (1, 2, None)
    }
    arch = arch.grouped(group_on(hardware, arch))
    problem = Problem.of(arch, hardware, JOB)
    chosen = plans[None]
    return Result(
        case=case,
        one=plans[1].prediction.tokens_per_s,
        two=plans[2].prediction.tokens_per_s,
        chosen=chosen.prediction.tokens_per_s,
        half_blocks=chosen.policy.half_blocks,
        walked=replayed_tokens_per_s(problem, chosen.policy),
        lane_free=lane_free(problem, [plan.policy for plan in plans.values()]),
        limit=physical_limit(arch, hardware),
        bound_by=chosen.prediction.bottleneck,
        policy={name: value for name, value in asdict(chosen.policy).items() if name != "expert_order"},
        seconds=(chosen.explanation.seconds, plans[1].explanation.seconds),
    )


def table(results: Iterable[Result]) -> str:
    """The record as text."""
    return "\n".join(
        [
            "# Two half-blocks",
            "",
            "`python -m scripts.optimality.half_blocks`. Generated tokens/s of endless jobs of 512 + 256 tokens on preset machines, by the",
            f"closed form. Asked for: at least {100 * TARGET:.0f} % of the lane-free figure (the best of the three plans), and the event walk "
            f"of the chosen plan within {100 * AGREEMENT:.0f} %.",
            "The planner chooses by the walk, not by the closed form. *Limit*: the formula of the physical limit at the preset's rates.",
            "*Planned in*: seconds of the planner on a busy machine, with one half-block given in brackets.",
            "",
            "| case | 1 half-block | 2 | chosen | tokens/s | lane-free | of it | walk | limit | bound by | planned in |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|",
            *(result.line() for result in results),
            "",
        ]
    )


def main() -> int:
    """The command line; 1 where a case misses what was asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [case for case, *_ in CASES]
    parser.add_argument("--cases", nargs="*", choices=names, default=names, metavar="CASE")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="record, without its suffix")
    args = parser.parse_args()
    results = []
    for case in CASES:
        if case[0] in args.cases:
            results.append(measure(*case))
            print(results[-1].line(), flush=True)
    record = {"kind": "flexmoe.half-blocks", "date": time.strftime("%Y-%m-%d"), "results": [asdict(r) for r in results]}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(results), encoding="utf-8")
    return 0 if all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
