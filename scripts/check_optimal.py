"""Is the planned policy the best? Rivals on random machines: a grid, random policies, and climbs by single units.

    python -m scripts.check_optimal [--machines 200] [--candidates 5000] [--jobs 2] [--seed 0] [--output benchmarks/optimal]

Every rival is judged by the same `evaluate`. Exit code 1 if any beats the planned policy by more than 2 %, or fits where
the planner says that nothing does; 75 if `--minutes` were over first: the same command resumes where it stopped, as
long as the code is the same.

    python -m scripts.check_optimal --mixed [--machines 100] [--candidates 1000] [--output benchmarks/optimal-mixed]

takes jobs with an end whose rows differ in length, and judges the planned policy and the best rivals by `simulate`; 3 % is
the tolerance.

    python -m scripts.check_optimal --agreement [--machines 1000] [--output benchmarks/agreement]

compares the closed form that the search ranks by with `simulate`, for a random policy of each machine and mixed job.

    python -m scripts.check_optimal --ablate [--machines 200] [--step 1] [--seed 0] [--output benchmarks/optimal]

plans instead with parts of the search left out, and records what each part is worth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path

from cost_model import solve
from cost_model.simulation.simulate import simulate
from policies.common.errors import InfeasibleError
from policies.policy import Policy
from scripts.optimality import ablation, agreement
from scripts.optimality.mixed_jobs import mixed_job
from scripts.optimality.random_machines import RandomProblem, random_problem
from scripts.optimality.rivals import Rivals

TOLERANCE, MIXED_TOLERANCE = 0.02, 0.03
CLIMBS, PER_CLIMB, PER_OWN_CLIMB = 20, 600, 3000
MIXED_CLIMBS, MIXED_PER_CLIMB, SIMULATED = 3, 60, 6
KIND = "flexmoe.optimal"
INTERRUPTED = 75
ROOT = Path(__file__).resolve().parents[1]
_JUDGES = ("check_optimal.py", "rivals.py", "random_machines.py", "mixed_jobs.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One machine. ``planned``, ``best``: tokens/s of the planned policy and of the best rival, 0 where nothing fits.

    ``by``: which rival; ``closed``: tokens/s of the planned policy in closed form; ``lp``: the largest optimum of a linear
    programme; ``cpu_s``: processor seconds of planning.
    """

    seed: int
    problem: str
    planned: float
    best: float
    by: str
    closed: float
    lp: float
    programmes: int
    evaluations: int
    seconds: float
    cpu_s: float
    candidates: int
    judged: int
    policy: dict
    rival: dict

    @property
    def ratio(self) -> float:
        """Best rival against planned."""
        return self.best / self.planned if self.planned else (float("inf") if self.best else 1.0)


def check(seed: int, candidates: int, mixed: bool = False) -> Result:
    """Plans one problem, and lets the rivals try.

    Args:
        mixed: of a job of rows that differ in length, and judged by `simulate`.
    """
    problem = random_problem(seed)
    if mixed:
        problem = replace(problem, workload=mixed_job(random.Random(seed)))
    rivals = Rivals(problem)
    start, processor = time.perf_counter(), _processor_s()
    try:
        plan = solve(problem.arch, problem.hardware, problem.workload)
    except InfeasibleError:
        plan = None
    seconds, cpu_s = time.perf_counter() - start, _processor_s() - processor
    climbs, per_climb, own = (
        (MIXED_CLIMBS, MIXED_PER_CLIMB, 4 * MIXED_PER_CLIMB) if mixed else (CLIMBS, PER_CLIMB, PER_OWN_CLIMB)
    )
    tried = rivals.candidates(candidates if plan else candidates // 5)
    rated = {"candidate": max(tried, key=rivals.tokens_per_s, default=None)}
    if plan:
        some = tried[:: max(1, len(tried) // climbs)][:climbs]
        climbed = [rivals.climb(policy, per_climb) for policy in [*some, rated["candidate"]] if policy]
        rated["climb"] = max(climbed, key=rivals.tokens_per_s, default=None)
        rated["climb from the planned"] = rivals.climb(plan.policy, own)
    judge = rivals.tokens_per_s
    if mixed and plan:
        judge = cache(partial(_simulated, problem))
        rated |= {f"no. {place}": policy for place, policy in enumerate(rivals.best(SIMULATED), 1)}
    by = max((name for name in rated if rated[name]), key=lambda name: judge(rated[name]), default="")
    best = rated.get(by)
    return Result(
        seed=seed,
        problem=str(problem),
        planned=judge(plan.policy) if plan else 0.0,
        best=judge(best) if best else 0.0,
        by=by,
        closed=plan.prediction.tokens_per_s if plan else 0.0,
        lp=plan.explanation.lp_tokens_per_s if plan else 0.0,
        programmes=plan.explanation.programmes if plan else 0,
        evaluations=plan.explanation.evaluations if plan else 0,
        seconds=seconds,
        cpu_s=cpu_s,
        candidates=len(tried),
        judged=rivals.judged,
        policy=asdict(plan.policy) if plan else {},
        rival=asdict(best) if best else {},
    )


def _simulated(problem: RandomProblem, policy: Policy) -> float:
    return simulate(problem.arch, problem.hardware, problem.workload, policy).tokens_per_s


def _processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run(
    machines: int, candidates: int, jobs: int, seed: int, seconds: float = float("inf"), mixed: bool = False
) -> Iterator[Result]:
    """Results from ``seed`` on, until so many machines could be planned for; those where nothing fits come on top.

    Args:
        seconds: begin no machine later.
    """
    seeds, waiting, last = count(seed), deque(), time.monotonic() + seconds
    with ProcessPoolExecutor(jobs) as pool:
        while machines > 0:
            while len(waiting) < min(2 * jobs, machines) and time.monotonic() < last:
                waiting.append(pool.submit(check, next(seeds), candidates, mixed))
            if not waiting:
                break
            result = waiting.popleft().result()
            machines -= bool(result.planned)
            yield result


def summary(results: list[Result], tolerance: float) -> list[str]:
    """What is to be shown, a line each."""
    planned = [each for each in results if each.planned]
    if not planned:
        return [f"{len(results)} machines, on which nothing fits"]
    beaten = [each for each in results if each.ratio > 1 + tolerance]
    worst = max(planned, key=lambda each: each.ratio)
    apart = max(planned, key=lambda each: abs(each.closed / each.planned - 1))
    seconds = sorted(each.seconds for each in planned)
    cpu_s = sorted(each.cpu_s for each in planned)
    return [
        f"{len(planned)} machines, {len(results) - len(planned)} more on which nothing fits",
        f"candidates that fit: at least {min(each.candidates for each in planned)} on each machine; "
        + f"judged: {sum(each.judged for each in planned)}",
        f"beaten by more than {tolerance:.0%}: {len(beaten)}; largest best rival / planned: {worst.ratio:.4f} (seed {worst.seed})",
        f"planned policy at least as good as every rival: {sum(each.ratio <= 1 for each in planned)}",
        f"planned policy in closed form against its judgement: at most {abs(apart.closed / apart.planned - 1):.1%} off "
        + f"(seed {apart.seed})",
        f"programmes per plan: at most {max(each.programmes for each in planned)}",
        f"seconds per plan: median {seconds[len(seconds) // 2]:.2f}, most {seconds[-1]:.2f} "
        + f"(processor: {cpu_s[len(cpu_s) // 2]:.2f}, {cpu_s[-1]:.2f})",
    ]


def _line(result: Result) -> str:
    if not result.planned:
        return f"{result.seed:5d}  nothing fits; {result.candidates} rivals do  {result.problem}"
    return (
        f"{result.seed:5d}  {result.planned:10.2f} planned  {result.best:10.2f} best rival  {result.ratio:.4f}  "
        f"lp {result.lp:10.2f}  {result.programmes:3d} LPs  {result.seconds:5.2f} s  {result.problem}"
    )


def write(path: Path, results: list[Result], about: dict) -> None:
    """The record: all results as JSON, and a table beside it. What ablations have recorded there stays."""
    document = {
        "kind": KIND,
        **about,
        "summary": summary(results, about["tolerance"]),
        "results": [asdict(each) for each in results],
    }
    document |= {name: value for name, value in ablation.document(path).items() if name.startswith("ablation")}
    head = "| seed | problem | planned tok/s | best rival | ratio | by | LP optimum | LPs | s | processor s |\n|---|---|---|---|---|---|---|---|---|---|\n"
    rows = "".join(
        f"| {r.seed} | {r.problem} | {r.planned:.2f} | {r.best:.2f} | {r.ratio:.4f} | {r.by} | {r.lp:.2f} | "
        f"{r.programmes} | {r.seconds:.2f} | {r.cpu_s:.2f} |\n"
        for r in results
    )
    lines = "".join(f"- {line}\n" for line in summary(results, about["tolerance"]))
    _, heading, sections = ablation.text(path).partition("\n## ")
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(
        f"# The planned policy and its rivals\n\n`{about['command']}`\n\n{lines}\n{head}{rows}{heading}{sections}"
    )


def earlier(path: Path, about: dict) -> list[Result]:
    """Results of a record that the same command began with the same code; else none."""
    document = ablation.document(path)
    same = document.get("kind") == KIND and all(document.get(name) == value for name, value in about.items())
    return [Result(**each) for each in document["results"]] if same else []


def code_digest() -> str:
    """Of all that plans and judges."""
    digest = hashlib.sha256()
    for folder in ("cost_model", "policies", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder != "scripts" or path.name in _JUDGES:
                digest.update(path.read_bytes())
    for path in sorted((ROOT / "cost_model").rglob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--machines", type=int, default=200, help="machines that can be planned for (200)")
    parser.add_argument("--candidates", type=int, default=5000, help="rivals that fit, on each machine (5000)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the first machine (0)")
    parser.add_argument("--output", type=Path, help="path of the record without suffix; none is written without it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no machine later (no limit)")
    parser.add_argument("--mixed", action="store_true", help="jobs of rows that differ in length, judged by simulate")
    parser.add_argument("--agreement", action="store_true", help="compare closed form and simulation instead")
    parser.add_argument("--ablate", action="store_true", help="plan with parts of the search left out")
    parser.add_argument("--step", type=int, default=1, help="with --ablate, from one seed to the next (1)")
    args = parser.parse_args(argv)
    if args.agreement:
        return _agreement(args)
    return _ablate(args) if args.ablate else _check(args)


def _ablate(args: argparse.Namespace) -> int:
    found, last = [], time.monotonic() + 60 * args.minutes
    for machine in ablation.machines(args.machines, args.seed, args.step):
        found.append(machine)
        losses = ", ".join(f"{name} {machine.loss(name):.2%}" for name in machine.outcomes)
        print(f"{machine.seed:5d}  {losses}", flush=True)
        if args.output:
            options = f"--machines {len(found)} --seed {args.seed} --step {args.step}"
            ablation.write(args.output, found, f"python -m scripts.check_optimal --ablate {options}")
        if time.monotonic() > last:
            break
    print(*ablation.table(found), sep="\n")
    return 0 if len(found) == args.machines else INTERRUPTED


def _check(args: argparse.Namespace) -> int:
    mixed = " --mixed" if args.mixed else ""
    command = (
        f"python -m scripts.check_optimal{mixed} --machines {args.machines} --candidates {args.candidates} "
        f"--seed {args.seed}"
    )
    about = {
        "command": command,
        "tolerance": MIXED_TOLERANCE if args.mixed else TOLERANCE,
        "code": code_digest(),
    }
    results = earlier(args.output, about) if args.output else []
    left, first = args.machines - sum(bool(each.planned) for each in results), args.seed + len(results)
    for result in run(left, args.candidates, args.jobs, first, 60 * args.minutes, args.mixed):
        results.append(result)
        print(_line(result), flush=True)
        if args.output:
            write(args.output, results, about)
    print(*summary(results, about["tolerance"]), sep="\n")
    if sum(bool(each.planned) for each in results) < args.machines:
        return INTERRUPTED
    return int(any(each.ratio > 1 + about["tolerance"] for each in results))


def _agreement(args: argparse.Namespace) -> int:
    """Compare as many drawn jobs as there are machines."""
    found = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for each in pool.map(agreement.compare, range(args.seed, args.seed + args.machines)):
            if each is not None:
                found.append(each)
                print(each.line(), flush=True)
    command = f"python -m scripts.check_optimal --agreement --machines {args.machines} --seed {args.seed}"
    lines = agreement.summary(found)
    print(*lines, sep="\n")
    if args.output:
        agreement.write(args.output, command, found)
    return int(not agreement.met(found))


if __name__ == "__main__":
    raise SystemExit(main())
