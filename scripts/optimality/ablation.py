"""What each part of the planner's search is worth: plans for the same machines with a part left out.

A part is left out by replacing an attribute of the module or class that holds it, so that the planner itself knows
nothing of this. All plans are judged by the prediction that `solve` returns.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from cost_model import solve
from cost_model.planner import (
    discrete,
    linearize,
    lp,
    lp_model,
    lp_sweep,
    moves,
    objective,
    search,
)
from policies.common.errors import InfeasibleError
from policies.workload import Workload
from scripts.optimality.random_machines import random_problem

_PERCENTILE = 0.95
_HEADING = "## What each part of the search is worth"
_NOTE = (
    "Losses are against the best plan of all variants of a machine. Processor seconds, programmes (LPs) and evaluations are "
    "means per plan."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The search with something left out.

    Attributes:
        name: of what is left out.
        without: (owner, attribute, what stands there instead), each.
        deletes: code that would be deleted with it.
    """

    name: str
    without: tuple[tuple[Any, str, Any], ...] = ()
    deletes: tuple[Any, ...] = ()

    @property
    def lines(self) -> int:
        """Lines of code that would be deleted."""
        return sum(len(inspect.getsourcelines(each)[0]) for each in self.deletes)


def _without_cuts(workload: Workload) -> tuple[moves.Move, ...]:
    cuts = {move.__qualname__ for move in moves.cut_moves(workload)}
    return tuple(move for move in moves.moves(workload) if move.__qualname__ not in cuts)


FULL = Variant(name="nothing")
VARIANTS = (
    FULL,
    Variant(
        name="LP start",
        without=((discrete.Choices, "run", lambda self, effort=1.0: []),),
        deletes=(lp, lp_model, lp_sweep, linearize, discrete),
    ),
    Variant(name="kicks", without=((search, "KICKS_EFFORT", 0),), deletes=(search.Climb.kicked,)),
    Variant(
        name="climbs by parts of units",
        without=((objective.Objective, "with_parts_of_units", lambda self, policy: self.tokens_per_s),),
        deletes=(objective.Objective.with_parts_of_units,),
    ),
    Variant(
        name="starts of other kinds",
        without=((search.Climb, "diverse", search.Climb.ranked),),
        deletes=(search.Climb.diverse,),
    ),
    Variant(
        name="moves to other cuts of the rows",
        without=((search, "moves", _without_cuts),),
        deletes=(moves.cut_moves,),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One plan: ``tokens_per_s`` predicted, processor seconds, linear programmes and evaluations."""

    tokens_per_s: float
    cpu_s: float
    programmes: int
    evaluations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The plans of one problem, by the variant's name."""

    seed: int
    problem: str
    outcomes: dict[str, Outcome]

    def loss(self, name: str) -> float:
        """What a variant's plan is slower than the best of all variants, as a part of it."""
        best = max(outcome.tokens_per_s for outcome in self.outcomes.values())
        return 1 - self.outcomes[name].tokens_per_s / best


@dataclass(slots=True)
class _Coarse:
    """`discrete.Choices.run` once for all variants of a problem; its time is added to each that asks for it."""

    run: Callable[..., list[lp.Relaxed]]
    kept: tuple[list[lp.Relaxed], int, float] | None = None
    asked: bool = field(default=False)

    def __call__(self, choices: discrete.Choices, effort: float = 1.0) -> list[lp.Relaxed]:
        self.asked = True
        if self.kept is None:
            start = time.process_time()
            found = self.run(choices, effort)
            self.kept = found, choices.programmes, time.process_time() - start
        choices.programmes = self.kept[1]
        return self.kept[0]


def machines(wanted: int, seed: int, step: int) -> Iterator[Machine]:
    """Plans of so many random machines on which something fits."""
    for number in count(seed, step):
        if wanted <= 0:
            return
        machine = _machine(number)
        if machine is not None:
            wanted -= 1
            yield machine


def _machine(seed: int) -> Machine | None:
    problem, coarse = random_problem(seed), _Coarse(discrete.Choices.run)
    outcomes = {}
    for variant in VARIANTS:
        coarse.asked, known = False, coarse.kept is not None
        with ExitStack() as stack:
            stack.enter_context(patch.object(discrete.Choices, "run", lambda self, effort=1.0: coarse(self, effort)))
            for owner, name, instead in variant.without:
                stack.enter_context(patch.object(owner, name, instead))
            start = time.process_time()
            try:
                plan = solve(problem.arch, problem.hardware, problem.workload)
            except InfeasibleError:
                return None
            cpu_s = time.process_time() - start
        outcomes[variant.name] = Outcome(
            tokens_per_s=plan.prediction.tokens_per_s,
            cpu_s=cpu_s + (coarse.kept[2] if coarse.kept and coarse.asked and known else 0.0),
            programmes=plan.explanation.programmes,
            evaluations=plan.explanation.evaluations,
        )
    return Machine(seed=seed, problem=str(problem), outcomes=outcomes)


def table(found: list[Machine]) -> list[str]:
    """A line per variant: worst, 95th-percentile and mean loss; processor seconds, programmes and evaluations; lines."""
    lines = [
        "| left out | worst loss | 95th percentile | mean | processor s | LPs | evaluations | lines it would delete |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        losses = sorted(machine.loss(variant.name) for machine in found)
        plans = [machine.outcomes[variant.name] for machine in found]
        worst, percentile = losses[-1], losses[int(_PERCENTILE * (len(losses) - 1))]
        lines.append(
            f"| {variant.name} | {worst:.2%} | {percentile:.2%} | {mean(losses):.2%} | {mean(p.cpu_s for p in plans):.2f} | "
            f"{mean(p.programmes for p in plans):.0f} | {mean(p.evaluations for p in plans):.0f} | {variant.lines or ''} |"
        )
    return lines


def write(path: Path, found: list[Machine], command: str) -> None:
    """Puts the table and all plans in place of those in the record (path without suffix), and leaves the rest of it."""
    lines = {variant.name: variant.lines for variant in VARIANTS}
    plans = {"command": command, "lines": lines, "machines": [asdict(machine) for machine in found]}
    path.with_suffix(".json").write_text(json.dumps(document(path) | {"ablation": plans}, indent=1) + "\n")
    before = text(path).partition(_HEADING)[0].rstrip("\n")
    section = "\n".join([_HEADING, "", f"`{command}`", "", _NOTE, "", *table(found), ""])
    path.with_suffix(".md").write_text(f"{before}\n\n{section}" if before else section)


def document(path: Path) -> dict[str, Any]:
    """The record's JSON; empty where there is none."""
    file = path.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {}


def text(path: Path) -> str:
    """The record's text; empty where there is none."""
    file = path.with_suffix(".md")
    return file.read_text() if file.exists() else ""
