"""The linear programme: where everything lives and how many rows run, for one discrete choice, in one solution.

Tokens per second are a ratio of two linear functions of block size and placement. Charnes and Cooper (1962): with u =
1 / (seconds of the job, or of one period) and every variable multiplied by u the ratio becomes linear, so that the best
block size comes with the best placement. Rows and bytes enter as amounts, never as a share times a block.

What a row costs is read off `phases`, `costs` and `plan_memory` (`cost_model.planner.linearize`); the bounds on a sweep are those
of `cost_model.timing.sweep_bounds` (`cost_model.planner.lp_sweep`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import pulp

from cost_model.memory.allocation import residency, slot_bytes
from cost_model.model.weight_units import unit_slack_bytes
from cost_model.planner.constraints import Fixed
from cost_model.planner.linearize import Choice, Slopes
from cost_model.planner.lp_sweep import bound_sweep
from cost_model.timing.problem import Problem
from policies.common.units import GIB
from policies.placement import TIERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a constraint that binds costs.

    Attributes:
        name: a lane, a shared resource, "schedule", "slots", or "gpu memory" and the like.
        tokens_per_s: gained by one GiB more of a memory, or where the seconds of the other are 1 % fewer.
    """

    name: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """The best that a choice can give if units, blocks and batches could be cut at will.

    Attributes:
        choice: what was taken as given.
        tokens_per_s: generated tokens per second.
        rows: of the block, by how they are attended (`load.MODES`).
        weight_bytes: by tier.
        slots: weight slots on the compute device.
        prices: of what binds, dearest first.
    """

    choice: Choice
    tokens_per_s: float
    rows: Mapping[str, float]
    weight_bytes: Mapping[str, float]
    slots: float
    prices: tuple[Price, ...]

    @property
    def block_size(self) -> float:
        """Rows in flight."""
        return sum(self.rows.values())


class Programme:
    """The linear programme of one choice.

    Every variable is an amount times u: rows in nominal blocks, weights in GiB, seconds in sweeps that move all weights
    once over the link, so that all numbers are near 1.

    Args:
        problem, choice: what is planned, and what is taken as given.
        fixed: shares that the user has decided.
    """

    def __init__(self, problem: Problem, choice: Choice, fixed: Fixed):
        self.problem, self.choice, self.fixed, self.lines = problem, choice, fixed, Slopes(problem, choice)
        self.lp = pulp.LpProblem("policy", pulp.LpMaximize)
        self.units = residency(problem.arch, fixed.expert_order)
        self.total_bytes = self.units.prefix_bytes[-1]
        self.block = self.lines.rows
        self.second = problem.hardware.gpu.h2d_bytes_per_s / self.total_bytes
        self._binding: dict[str, list[tuple[pulp.LpConstraint, float]]] = {}
        self.u = self.variable("u")
        self.rows = {mode: self.variable(f"rows_{mode}") for mode in choice.modes}
        self.weights = {tier: self.variable(f"weights_{tier}") for tier in TIERS}
        self.slots = self.variable("slots")
        self.sweeps = [self.variable(f"sweep_{i}") for i in range(len(self.lines.phases))]
        self._normalize()
        self._place_weights()
        self._bound_rows()
        self._bound_memory()
        for index in range(len(self.sweeps)):
            bound_sweep(self, index)

    # What the constraints are written with.

    def variable(self, name: str) -> pulp.LpVariable:
        """A new variable of at least 0."""
        return self.lp.add_variable(name, lowBound=0)

    def every_row(self, factor: float) -> list[tuple[pulp.LpVariable, float]]:
        """``factor`` for each row of the block."""
        return [(rows, factor * self.block) for rows in self.rows.values()]

    def rows_by_mode(self, factors: Mapping[str, float], *modes: str) -> list[tuple[pulp.LpVariable, float]]:
        """A factor for each row in these modes (default all), that of its mode."""
        chosen = [mode for mode in self.rows if not modes or mode in modes]
        return [(self.rows[mode], factors[mode] * self.block) for mode in chosen]

    def at_most_zero(self, *terms: tuple, equal: bool = False, name: str = "", worth: float = 0.0) -> None:
        """The sum of the terms is at most 0, or 0. ``worth``: what the price of ``name`` counts as one more."""
        sums: dict[pulp.LpVariable, float] = {}
        for variable, factor in terms:
            sums[variable] = sums.get(variable, 0.0) + float(factor)
        expression = pulp.LpAffineExpression({v: factor for v, factor in sums.items() if factor})
        sense = pulp.LpConstraintEQ if equal else pulp.LpConstraintLE
        constraint = pulp.LpConstraint(expression, sense, f"c{self.lp.numConstraints()}", 0)
        self.lp.addConstraint(constraint)
        if name:
            self._binding.setdefault(name, []).append((constraint, worth))

    # What every choice has.

    def _normalize(self) -> None:
        """Seconds of the period · u = 1, and the tokens of the period are to be many."""
        phases = self.lines.phases
        sweeps = sum(phase.sweeps for phase in phases)
        self.period_s = sweeps / self.second
        spent = {variable: phase.sweeps / sweeps for variable, phase in zip(self.sweeps, phases)}
        one = pulp.LpConstraint(pulp.LpAffineExpression(spent), pulp.LpConstraintEQ, "period", 1)
        self.lp.addConstraint(one)
        self.lp.setObjective(pulp.LpAffineExpression(dict(self.every_row(self.lines.tokens))))

    def _place_weights(self) -> None:
        all_gib, choice, fixed = self.total_bytes / GIB, self.choice, self.fixed
        self.at_most_zero(*((w, 1.0) for w in self.weights.values()), (self.u, -all_gib), equal=True)
        for tier, share in (("gpu", fixed.w_gpu_percent), ("cpu", fixed.w_cpu_percent)):
            if share is not None:
                self.at_most_zero((self.weights[tier], 1), (self.u, -share / 100 * all_gib), equal=True)
        if not choice.disk_weights:
            self.at_most_zero((self.weights["disk"], 1))
        if not choice.streams:
            self.at_most_zero((self.weights["gpu"], -1), (self.u, all_gib))
            self.at_most_zero((self.slots, 1))
        elif fixed.weight_slots is not None:
            self.at_most_zero((self.slots, 1), (self.u, -fixed.weight_slots), equal=True)
        else:
            self.at_most_zero((self.slots, -1), (self.u, 2))
            self.at_most_zero((self.slots, 1), (self.u, -max(2, len(self.units.order))))

    def _bound_rows(self) -> None:
        fixed = self.fixed
        self.at_most_zero(*self.every_row(-1.0), (self.u, 1))
        if self.choice.most_rows is not None:
            self.at_most_zero(*self.every_row(1.0), (self.u, -self.choice.most_rows))
        if fixed.num_gpu_batches is not None:
            rows = fixed.num_gpu_batches * self.choice.gpu_batch_size
            self.at_most_zero(*self.every_row(1.0), (self.u, -rows), equal=True)
        homes = {"gpu": "gpu", "fetch": "cpu", "cpu": "cpu", "disk": "disk"}
        for tier, share in (("gpu", fixed.cache_gpu_percent), ("cpu", fixed.cache_cpu_percent)):
            if share is not None:
                factors = {mode: (homes[mode] == tier) - share / 100 for mode in self.rows}
                self.at_most_zero(*self.rows_by_mode(factors), equal=True)
        if fixed.cpu_attention_percent is not None:
            attended = fixed.cpu_attention_percent / 100
            factors = {mode: {"cpu": 1 - attended, "fetch": -attended}.get(mode, 0.0) for mode in self.rows}
            self.at_most_zero(*self.rows_by_mode(factors), equal=True)

    def _bound_memory(self) -> None:
        used = {tier: self._bytes_in(tier) for tier in TIERS}
        arch = self.problem.arch
        slack = 1 + unit_slack_bytes(arch) * len(self.units.order) / self.total_bytes
        used["gpu"].append((self.weights["gpu"], slack * self.problem.dtype_bytes / arch.dtype_bytes))
        used["cpu"].append((self.weights["cpu"], slack))
        used["disk"].append((self.weights["disk"], 1.0))
        if self.choice.streams:
            used["gpu"].append((self.slots, slot_bytes(arch, self.units.place(0, 0)) / GIB))
        for largest, lines in (
            ("workspace", [(self.every_row(line.per_row / GIB), line) for line in self.lines.workspace]),
            ("gathered", [(self._rows_of(mode, line.per_row), line) for mode, line in self.lines.gathered.items()]),
        ):
            variable = self.variable(largest)
            used["gpu"].append((variable, 1.0))
            for rows, line in lines:
                self.at_most_zero(*rows, (self.u, line.fixed / GIB), (variable, -1.0))
        for name, budget in self.problem.hardware.budgets().items():
            if budget is not None:
                terms = [term for tier in name.split("+") for term in used[tier]]
                self.at_most_zero(*terms, (self.u, -budget / GIB), name=f"{name} memory", worth=1.0)

    def _rows_of(self, mode: str, nbytes: float) -> list[tuple[pulp.LpVariable, float]]:
        return [(self.rows[mode], nbytes * self.block / GIB)]

    def _bytes_in(self, tier: str) -> list[tuple[pulp.LpVariable, float]]:
        common, kv = self.lines.common[tier], self.lines.kv
        own = sum(kv[mode][tier].fixed for mode in ("gpu", "cpu") if mode in kv)
        shared = max(
            (kv[mode][tier].fixed for mode in ("fetch", "disk") if mode in kv), default=0.0
        )  # one staging buffer
        terms = [(self.u, (common.fixed + own + shared) / GIB), *self.every_row(common.per_row / GIB)]
        return terms + [term for mode in kv for term in self._rows_of(mode, kv[mode][tier].per_row)]

    # The answer.

    def solve(self) -> Relaxed | None:
        """The optimum; None where nothing fits."""
        self.lp.solve(_solver())
        u, placed = self.u.varValue, sum(weights.varValue or 0.0 for weights in self.weights.values())
        if pulp.LpStatus[self.lp.status] != "Optimal" or not u or placed <= 0:  # u is 0 within rounding
            return None

        def amount(variable: pulp.LpVariable) -> float:
            return max(0.0, variable.varValue or 0.0) / u

        return Relaxed(
            choice=self.choice,
            tokens_per_s=pulp.value(self.lp.objective) / self.period_s,
            rows={mode: amount(rows) * self.block for mode, rows in self.rows.items()},
            weight_bytes={tier: amount(weights) * GIB for tier, weights in self.weights.items()},
            slots=amount(self.slots),
            prices=tuple(sorted(self._prices(u), key=lambda price: -price.tokens_per_s)),
        )

    def _prices(self, u: float) -> list[Price]:
        found = []
        for name, constraints in self._binding.items():
            # A memory's worth is one GiB, that is u in the programme; a lane's is 1 % of its seconds.
            worth = sum(abs(c.pi or 0.0) * (u if one else 0.01 * self._seconds(c)) for c, one in constraints)
            if worth > 1e-9 * self.period_s:
                found.append(Price(name=name, tokens_per_s=worth / self.period_s))
        return found

    def _seconds(self, constraint: pulp.LpConstraint) -> float:
        """What the constraint's lane takes, that is, what it asks of the sweep."""
        times = {variable.name for variable in self.sweeps}
        return sum(factor * (v.varValue or 0.0) for v, factor in constraint.items() if v.name not in times)


@lru_cache(maxsize=1)
def _solver() -> pulp.LpSolver:
    """HiGHS where it is installed, else the CBC that comes with PuLP."""
    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 comes without CBC; this package asks for PuLP 3.
        warnings.simplefilter("ignore", DeprecationWarning)
        solvers = [pulp.getSolver(name, msg=False) for name in ("HiGHS", "PULP_CBC_CMD")]
    return next(solver for solver in solvers if solver.available())
