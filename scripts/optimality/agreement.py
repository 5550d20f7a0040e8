"""Do the closed form and the simulation agree? Random policies of random machines and jobs of mixed lengths."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cost_model.simulation.simulate import simulate
from cost_model.timing.evaluate import evaluate
from scripts.optimality.mixed_jobs import mixed_job
from scripts.optimality.random_machines import random_problem
from scripts.optimality.rivals import Rivals

#: What is asked of the errors.
MEDIAN, P95, WORST = 0.03, 0.15, 0.50


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One job under one policy, in tokens/s."""

    seed: int
    problem: str
    schedule: str
    closed: float
    simulated: float

    @property
    def error(self) -> float:
        """Of the closed form, as a part of the simulation."""
        return abs(self.closed / self.simulated - 1)

    def line(self) -> str:
        """For the terminal."""
        return f"{self.seed:5d}  {self.closed / self.simulated:6.3f}  {self.schedule:8}  {self.problem}"


def compare(seed: int) -> Agreement | None:
    """Compare a random policy; None where none fits."""
    problem = replace(random_problem(seed), workload=mixed_job(random.Random(seed)))
    policy = Rivals(problem).any_fitting()
    if policy is None:
        return None
    case = problem.arch, problem.hardware, problem.workload, policy
    return Agreement(
        seed=seed,
        problem=str(problem),
        schedule=policy.schedule,
        closed=evaluate(*case).tokens_per_s,
        simulated=simulate(*case).tokens_per_s,
    )


def errors(found: Sequence[Agreement]) -> tuple[float, float, float]:
    """(median, 95th percentile, largest)."""
    ordered = sorted(each.error for each in found)
    return statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]


def met(found: Sequence[Agreement]) -> bool:
    """Whether the errors are as small as is asked."""
    return all(error <= most for error, most in zip(errors(found), (MEDIAN, P95, WORST), strict=True))


def summary(found: Sequence[Agreement]) -> list[str]:
    """What is to be shown, a line each."""
    median, p95, worst = errors(found)
    last = max(found, key=lambda each: each.error)
    return [
        f"{len(found)} jobs of mixed lengths, each under a random policy that fits",
        f"closed form against simulation: median {median:.1%} (asked {MEDIAN:.0%}), 95th percentile {p95:.1%} ({P95:.0%}), "
        f"worst {worst:.1%} ({WORST:.0%}; seed {last.seed})",
    ]


def write(path: Path, command: str, found: Sequence[Agreement]) -> None:
    """The record: all jobs as JSON, and the summary beside it."""
    lines, document = summary(found), {"kind": "flexmoe.agreement", "command": command}
    results = [asdict(each) for each in found]
    path.with_suffix(".json").write_text(json.dumps(document | {"summary": lines, "results": results}, indent=1) + "\n")
    text = "".join(f"- {line}\n" for line in lines)
    path.with_suffix(".md").write_text(f"# Closed form and simulation\n\n`{command}`\n\n{text}")
