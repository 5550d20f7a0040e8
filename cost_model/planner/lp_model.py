"""The variables of one linear programme, its constraints by name, and what the binding ones are worth.

Letters of all equations in `lp` and `lp_sweep`:

    s, n    prompt and new tokens of a row
    B       rows in flight, B = Σ x_m; x_m of them attended in mode m (`sweep_load.MODES`: gpu, fetch, disk, cpu)
    λ       rows admitted per sweep; a row lives L sweeps, so B = λ L. The pace λ s is part of the choice
    G       tokens generated per row of the block in the period, n for the whole life of each row
    W       bytes of all weights, W = Σ w_τ; w_τ of them live in tier τ (gpu, cpu, disk)
    k       weight slots on the compute device, of b bytes each
    N_i     sweeps of kind i (phase i) in the period, N = Σ N_i; one of them takes t_i seconds
    T       seconds of the period, T = Σ N_i t_i
    t₀      seconds in which all weights cross the link once, t₀ = W / h2d rate; T₀ = N t₀
    u       T₀ / T: every variable below is an amount times u (Charnes and Cooper 1962)

An inequality that is linear in the amounts and has a constant c, as Σ a x ≤ c, becomes Σ a (u x) - c u ≤ 0. So every row
of the programme but one is homogeneous. Rows are counted in nominal blocks, weights in GiB and seconds in t₀, so that all
numbers are near 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pulp

from cost_model.memory.allocation import residency
from cost_model.planner.constraints import Choice
from cost_model.planner.linearize import Slopes
from cost_model.timing.problem import Problem
from policies.placement import TIERS

#: A variable and its factor.
Term = tuple[pulp.LpVariable, float]
Terms = list[Term]
#: A price below this part of the objective is rounding.
_LEAST_PRICE = 1e-9
#: What the price of a lane counts as one more.
_ONE_PERCENT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a constraint that binds costs.

    Attributes:
        name: a lane, a shared resource, "schedule", "slots", or "gpu memory" and the like.
        tokens_per_s: gained by one GiB more of a memory, or where the seconds of the other are 1 % fewer.
    """

    name: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class _Named:
    """A constraint with a price; ``is_memory``: its price is of one GiB, and not of 1 % of its seconds."""

    constraint: pulp.LpConstraint
    is_memory: bool


class Model:
    """The variables of one choice, and the constraints that were added.

    Args:
        problem, choice: what is planned, and what is taken as given.
        expert_order: `Fixed.expert_order`.

    Attributes:
        lines: what one more row costs, around the nominal block.
        block: rows of the nominal block.
        per_s: 1 / t₀: factors in seconds times this are factors in the programme's unit of time.
        period_s: T₀.
        u, rows, weights, slots, sweeps: the variables u, u x_m, u w_τ, u k and u t_i.
    """

    def __init__(self, problem: Problem, choice: Choice, expert_order: tuple[tuple[int, ...], ...] | None):
        self.problem, self.choice, self.lines = problem, choice, Slopes(problem, choice)
        self.units = residency(problem.arch, expert_order)
        self.total_bytes: int = self.units.prefix_bytes[-1]
        self.block = self.lines.rows
        self.per_s = problem.hardware.gpu.h2d_bytes_per_s / self.total_bytes
        self.period_s = sum(phase.sweeps for phase in self.lines.phases) / self.per_s
        self._lp = pulp.LpProblem("policy", pulp.LpMaximize)
        self._named: dict[str, list[_Named]] = {}
        self.u = self.variable("u")
        self.rows = {mode: self.variable(f"rows_{mode}") for mode in choice.modes}
        self.weights = {tier: self.variable(f"weights_{tier}") for tier in TIERS}
        self.slots = self.variable("slots")
        self.sweeps = [self.variable(f"sweep_{i}") for i in range(len(self.lines.phases))]

    def variable(self, name: str) -> pulp.LpVariable:
        """A new variable of at least 0."""
        return self._lp.add_variable(name, lowBound=0)

    def every_row(self, factor: float) -> Terms:
        """``factor`` for each row of the block."""
        return [(rows, factor * self.block) for rows in self.rows.values()]

    def rows_by_mode(self, factors: Mapping[str, float], *modes: str) -> Terms:
        """A factor for each row in these modes (default all), that of its mode."""
        chosen = [mode for mode in self.rows if not modes or mode in modes]
        return [(self.rows[mode], factors[mode] * self.block) for mode in chosen]

    def rows_s(self, seconds: Mapping[str, float], *modes: str) -> Terms:
        """`rows_by_mode` of seconds, in the programme's unit of time."""
        return times(self.rows_by_mode(seconds, *modes), self.per_s)

    def maximize(self, terms: Terms) -> None:
        """Sets the objective."""
        self._lp.setObjective(pulp.LpAffineExpression(dict(terms)))

    def equals_one(self, terms: Terms) -> None:
        """The one constraint that is not homogeneous."""
        self._lp.addConstraint(
            pulp.LpConstraint(pulp.LpAffineExpression(dict(terms)), pulp.LpConstraintEQ, "period", 1)
        )

    def at_most_zero(self, terms: Iterable[Term], *, name: str = "", is_memory: bool = False) -> None:
        """The sum of the terms is at most 0. With a ``name`` it has a price: of one GiB for a memory, else of 1 % of time."""
        constraint = self._add(terms, pulp.LpConstraintLE)
        if name:
            self._named.setdefault(name, []).append(_Named(constraint, is_memory))

    def is_zero(self, terms: Iterable[Term]) -> None:
        """The sum of the terms is 0."""
        self._add(terms, pulp.LpConstraintEQ)

    def largest(self, name: str, lines: Iterable[Terms]) -> pulp.LpVariable:
        """A variable that is at least each of the sums: y ≥ max(…) as one row per sum."""
        variable = self.variable(name)
        for terms in lines:
            self.at_most_zero([*terms, (variable, -1.0)])
        return variable

    def _add(self, terms: Iterable[Term], sense: int) -> pulp.LpConstraint:
        sums: dict[pulp.LpVariable, float] = {}
        for variable, factor in terms:
            sums[variable] = sums.get(variable, 0.0) + float(factor)
        expression = pulp.LpAffineExpression({v: factor for v, factor in sums.items() if factor})
        constraint = pulp.LpConstraint(expression, sense, f"c{self._lp.numConstraints()}", 0)
        self._lp.addConstraint(constraint)
        return constraint

    # The answer.

    def solve(self) -> bool:
        """Finds the optimum; False where nothing fits."""
        self._lp.solve(_solver())
        placed = sum(weights.varValue or 0.0 for weights in self.weights.values())
        return pulp.LpStatus[self._lp.status] == "Optimal" and bool(self.u.varValue) and placed > 0

    @property
    def tokens_per_s(self) -> float:
        """The objective, G u B, by (2) over T₀."""
        return float(pulp.value(self._lp.objective)) / self.period_s

    def amount(self, variable: pulp.LpVariable) -> float:
        """What a variable stands for: its value over u."""
        return max(0.0, float(variable.varValue or 0.0)) / float(self.u.varValue)

    def prices(self) -> tuple[Price, ...]:
        """Of what binds, dearest first."""
        found = []
        for name, constraints in self._named.items():
            worth = sum(self._worth(each) for each in constraints)
            if worth > _LEAST_PRICE * self.period_s:
                found.append(Price(name=name, tokens_per_s=worth / self.period_s))
        return tuple(sorted(found, key=lambda price: -price.tokens_per_s))

    def _worth(self, named: _Named) -> float:
        """The dual times what is counted as one more: 1 GiB, which is u in the programme, or 1 % of the seconds asked for."""
        dual = abs(float(named.constraint.pi or 0.0))
        if named.is_memory:
            return dual * float(self.u.varValue)
        sweeps = {variable.name for variable in self.sweeps}
        seconds = (factor * (v.varValue or 0.0) for v, factor in named.constraint.items() if v.name not in sweeps)
        return dual * _ONE_PERCENT * float(sum(seconds))


def times(terms: Sequence[Term], factor: float) -> Terms:
    """The terms with their factors multiplied."""
    return [(variable, value * factor) for variable, value in terms]


@lru_cache(maxsize=1)
def _solver() -> pulp.LpSolver:
    """HiGHS where it is installed, else the CBC that comes with PuLP."""
    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 comes without CBC; this package asks for PuLP 3.
        warnings.simplefilter("ignore", DeprecationWarning)
        solvers = [pulp.getSolver(name, msg=False) for name in ("HiGHS", "PULP_CBC_CMD")]
    return next(solver for solver in solvers if solver.available())
