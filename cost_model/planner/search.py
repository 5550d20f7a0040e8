"""The best policy: linear programmes for what is continuous, rounding, and a local search for what is not.

The programmes' optima are the starts. Each is climbed from by single moves (`moves`), and the best is left by a few
random moves at once, to be climbed from again: where memory binds, one step alone often does not fit, or undoes what it
gains, as rows against slots, or larger batches against fewer rows. These climbs go up by what policies would give if weight
units could be cut (`Objective.with_parts_of_units`). Every candidate is evaluated by `predict`; the best few of
each kind are evaluated once more with their sweeps replayed, and so are the steps from the best of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from cost_model.memory.allocation import residency
from cost_model.planner.constraints import Fixed
from cost_model.planner.discrete import Choices, choice_of, halves_may_pay, rounded
from cost_model.planner.lp import Relaxed
from cost_model.planner.lp_model import Price
from cost_model.planner.moves import as_one_or_two, in_batches, moves, simpler
from cost_model.planner.objective import Objective
from cost_model.simulation.replayed_phases import replayed_operations, replayed_tokens_per_s
from cost_model.timing.problem import Problem
from policies.policy import SCHEDULES, Policy

#: Rounds of climbs: (policies that are climbed from, the best of the round before; effort for each, as `Objective.effort`).
ROUNDS = ((8, 300), (4, 400))
#: Then random kicks away from the best few: for so much effort in all, and so much since the last gain of so much.
KICKS_EFFORT, _IDLE_EFFORT, _KICK_GAIN, _KICKED_FROM = 3000, 800, 1.001, 4
#: Then, with sweeps replayed: operations for a schedule, policies that are compared, and what a step has to give.
_FINAL_OPS, _FEWEST_FINALISTS, _MOST_FINALISTS, _FINAL_GAIN = 1_000_000, 2, 8, 1.002
#: A schedule whose best policy is slower by this part before kicks has lost.
_SCHEDULE_LOSS = 0.03
_NEARBY, _PER_NEARBY = 2, 350
#: Slots with which experts that come on demand stay, at least; starts that are tried so; sweeps of a prompt at a slow pace.
_MANY_SLOTS, _SLOTTED, _SLOW_PACE = 8, 2, 4
#: Step sizes, coarse to fine; the last ones are single rows and units where the counts are small.
_STEPS = (1.0, 0.4, 0.15, 0.05, 0.015)
_GAIN = 1 + 1e-6
_SHRINKS = 10
_SEED, _PER_KICK = 0, 150
#: Moves of a kick, their step sizes, and those of the climb after it; how often a kick starts at the best policy.
_KICKS, _KICK_STEPS, _STEPS_AFTER, _FROM_BEST = (2, 3, 4), (1.0, 0.5, 0.25, 0.1), (0.3, 0.1, 0.03), 0.7
#: What a simpler policy may give away: less than any prediction is worth; and steps to it, as fitting may undo one.
_SIMPLER_LOSS, _MOST_SIMPLER = 0.003, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What a search has found.

    Attributes:
        policy, tokens_per_s: the best one, and what it gives.
        lp_tokens_per_s: the largest optimum of a linear programme.
        prices: of what binds in the programme of the policy's own choice, dearest first.
        programmes, evaluations: linear programmes that were solved, policies that were evaluated.
    """

    policy: Policy
    tokens_per_s: float
    lp_tokens_per_s: float
    prices: tuple[Price, ...]
    programmes: int
    evaluations: int


def optimum(problem: Problem, fixed: Fixed, smallest: Iterable[Policy], effort: float = 1.0) -> Optimum:
    """The best policy that the search finds.

    Args:
        smallest: policies that fit for sure, should the programmes end at none that does.
        effort: how long to climb; 1 is as long as a plan may take.
    """
    schedules = SCHEDULES if fixed.schedule is None else (fixed.schedule,)
    smallest = list(smallest)
    searches = [_Search(problem, replace(fixed, schedule=schedule), smallest, effort) for schedule in schedules]
    least = (1 - _SCHEDULE_LOSS) * max(search.tokens_per_s for search in searches)
    for search in searches:
        if search.tokens_per_s and search.tokens_per_s >= least:
            search.finish()
    # The replayed seconds decide, so that no schedule is worse for being compared with another.
    best = max(searches, key=lambda each: each.replayed_tokens_per_s).optimum()
    return replace(
        best,
        lp_tokens_per_s=max(best.lp_tokens_per_s, *(search.lp_tokens_per_s for search in searches)),
        programmes=sum(search.programmes for search in searches),
        evaluations=sum(search.evaluations for search in searches),
    )


class _Search:
    """The search within one schedule: programmes and climbs at once, the rest by `finish`.

    Attributes:
        lp_tokens_per_s: the largest optimum of a programme.
        tokens_per_s: of the best policy so far.
        replayed_tokens_per_s: of the final policy; 0 before it is known.
    """

    def __init__(self, problem: Problem, fixed: Fixed, smallest: Sequence[Policy], effort: float):
        self._problem, self._fixed, self._effort = problem, fixed, effort
        self._choices, self._climb = Choices(problem, fixed), Climb(Objective(problem, fixed))
        climb, found = self._climb, self._choices.run(effort)
        starts = [start for start in (climb.start(rounded(each, problem, fixed)) for each in found) if start]
        small = [policy for policy in map(fixed.applied, smallest) if climb.objective.tokens_per_s(policy)]
        with_slots = [policy for start in climb.ranked(starts)[:_SLOTTED] for policy in climb.with_many_slots(start)]
        # Rounding can spoil what is best by the programme, so both orders count.
        pool = _alternating(climb.diverse([*starts, *small, *with_slots]), starts)
        for keep, each in ROUNDS:
            pool = climb.ranked([*(climb.run(policy, effort * each) for policy in pool[:keep]), *pool[keep:]])
        self._pool, self._found, self._final_evaluations, self.replayed_tokens_per_s = pool, found, 0, 0.0
        self.lp_tokens_per_s = max((each.tokens_per_s for each in found), default=0.0)
        self.tokens_per_s = climb.objective.tokens_per_s(pool[0]) if pool else 0.0

    def finish(self) -> None:
        """Kicks; then the best few of each kind as replayed, and a short climb from the best of these."""
        climb = self._climb
        best = climb.simplified(climb.kicked(self._pool[:_KICKED_FROM], self._effort))
        final = Climb(Objective(self._problem, self._fixed, replayed_tokens_per_s), gain=_FINAL_GAIN)
        judged = self._effort * _FINAL_OPS / replayed_operations(self._problem, best)
        # Of rows of many lengths the replayed sweeps are means: they tell less apart than more kinds would differ in.
        finer = not self._problem.workload.lengths
        few = list(dict.fromkeys([best, *climb.diverse(climb.objective.evaluated, finer=finer)]))
        first, *_ = final.ranked(few[: max(_FEWEST_FINALISTS, min(_MOST_FINALISTS, int(judged / 2)))])
        self._best = final.run(first, judged - final.objective.evaluations, _STEPS_AFTER)
        self.replayed_tokens_per_s = final.objective.tokens_per_s(self._best)
        self._final_evaluations = final.objective.evaluations

    @property
    def programmes(self) -> int:
        """Linear programmes that were solved."""
        return self._choices.programmes

    @property
    def evaluations(self) -> int:
        """Policies that were evaluated."""
        return self._climb.objective.evaluations + self._final_evaluations

    def optimum(self) -> Optimum:
        """The final policy."""
        best, choices = self._best, self._choices
        own = choices.solve(choices.bracket(choice_of(best, self._problem), best.block_size))
        return _optimum(best, self._climb, choices, [*self._found, own], prices=own.prices if own else ())


def improved(problem: Problem, fixed: Fixed, policy: Policy) -> Optimum:
    """A good policy near a given one, quickly: for machines and models that differ little from those it was made for."""
    choices, climb = Choices(problem, fixed), Climb(Objective(problem, fixed))
    own = choices.bracket(choice_of(policy, problem), policy.block_size)
    found = [relaxed for relaxed in map(choices.solve, choices.around(own)) if relaxed]
    starts = [climb.start(rounded(relaxed, problem, fixed)) for relaxed in found]
    starts.append(climb.objective.fitted(policy))
    near = climb.diverse([*(start for start in starts if start), policy])[:_NEARBY]
    return _optimum(climb.ranked(climb.run(start, _PER_NEARBY) for start in near)[0], climb, choices, found)


def _optimum(
    policy: Policy, climb: Climb, choices: Choices, found: Iterable[Relaxed | None], prices: tuple[Price, ...] = ()
) -> Optimum:
    return Optimum(
        policy=policy,
        tokens_per_s=climb.objective.tokens_per_s(policy),
        lp_tokens_per_s=max((relaxed.tokens_per_s for relaxed in found if relaxed), default=0.0),
        prices=prices,
        programmes=choices.programmes,
        evaluations=climb.objective.evaluations,
    )


class Climb:
    """Local search by one objective.

    Args:
        objective: what a policy is worth; its ``effort`` is what climbs are bounded by.
        gain: what a step has to give, as a ratio.
    """

    def __init__(self, objective: Objective, gain: float = _GAIN):
        self.objective, self._gain = objective, gain
        halves = (as_one_or_two,) if halves_may_pay(objective.problem, objective.fixed) else ()
        by_bytes = (objective.with_kv_in_spare, objective.with_unit_for_kv)
        trades = (lambda policy, _step, trade=trade: trade(policy) for trade in by_bytes)
        self._kicks = (*moves(objective.problem.workload), *halves)
        self._moves = (*self._kicks, *trades)

    def ranked(self, policies: Iterable[Policy]) -> list[Policy]:
        """The policies, best first, each once."""
        return sorted(dict.fromkeys(policies), key=self.objective.tokens_per_s, reverse=True)

    def diverse(self, policies: Iterable[Policy], *, finer: bool = False) -> list[Policy]:
        """The best of each kind first, then the best of all.

        Args:
            finer: those in which the CPU attends all KV in host memory are a kind, and so are those of at most two GPU batches.
        """
        ranked = self.ranked(policies)
        kinds: dict[tuple[bool, ...], Policy] = {}
        for policy in ranked:
            attended, slots = policy.cpu_attention_percent, policy.weight_slots or 0
            homes = policy.cache_gpu_percent > 1, policy.cache_cpu_percent > 1, attended > 50
            kind = *homes, slots >= _MANY_SLOTS, policy.half_blocks > 1
            kinds.setdefault((*kind, attended == 100, policy.num_gpu_batches <= 2) if finer else kind, policy)
        return list(dict.fromkeys([*kinds.values(), *ranked]))

    def start(self, policy: Policy) -> Policy | None:
        """The policy where it fits, else one with a few rows and slots fewer; None where those do not fit."""
        for _ in range(_SHRINKS):
            found = self.objective.fitted(policy)
            if found is not None:
                return found
            policy = _shrunk(policy)
        return self.objective.fitted(policy)

    def with_many_slots(self, policy: Policy) -> Iterator[Policy]:
        """The policy with more and more slots, and fewer resident weights: few rows keep the experts there that they ask for.

        A few slots more do not help, so no step leads to that; nor, at another pace, to sweeps with so few prompt tokens that
        most experts stay away.
        """
        job, most = self.objective.problem.workload, len(residency(self.objective.problem.arch).order) - 1
        slow, even = job.prompt_len // _SLOW_PACE, policy.block_size * job.prompt_len // job.gen_len
        for pace in dict.fromkeys(max(1, each) for each in (policy.prefill_tokens, slow, even)):
            fits, slots = None, _MANY_SLOTS
            while slots <= most and (found := self._with(policy, slots, pace)):
                yield found
                fits, slots = found, slots * 3 // 2
            if fits:
                yield self._filled(fits, min(slots, most + 1))

    def _with(self, policy: Policy, slots: int, pace: int) -> Policy | None:
        return self.objective.fitted(replace(policy, weight_slots=slots, prefill_tokens=pace))

    def _filled(self, policy: Policy, beyond: int) -> Policy:
        """The policy with the most slots, fewer than ``beyond``, that fit."""
        low = policy.weight_slots or 0
        while beyond - low > 1:
            middle = (low + beyond) // 2
            found = self._with(policy, middle, policy.prefill_tokens)
            policy, low, beyond = (found, middle, beyond) if found else (policy, low, middle)
        return policy

    def run(
        self,
        policy: Policy,
        effort: float,
        steps: tuple[float, ...] = _STEPS,
        up_by: Callable[[Policy], float] | None = None,
    ) -> Policy:
        """The best policy met on the way up by single moves, each repeated while it helps.

        Args:
            up_by: what the way goes up by; default: the objective's tokens per second.
        """
        worth = up_by or self.objective.tokens_per_s
        best, at, last = policy, policy, self.objective.effort + effort
        for step in steps:
            before = None
            while at != before:
                before = at
                for move in self._moves:
                    while self.objective.effort < last:
                        tried = self.objective.fitted(move(at, step))
                        if tried is None:
                            break
                        best = tried if self._gains(tried, best) else best
                        if worth(tried) <= worth(at) * self._gain:
                            break
                        at = tried
        return best

    def kicked(self, policies: Sequence[Policy], effort: float) -> Policy:
        """The best of climbs that start a few random moves away from the best policy, or from another one.

        The random numbers are the same in every plan.

        Args:
            policies: best first.
            effort: a part of `KICKS_EFFORT`.
        """
        rng, best, gained = random.Random(_SEED), policies[0], self.objective.effort
        last = gained + effort * KICKS_EFFORT
        while self.objective.effort < min(last, gained + effort * _IDLE_EFFORT):
            away = best if rng.random() < _FROM_BEST else rng.choice(policies)
            for _ in range(rng.choice(_KICKS)):
                away = rng.choice(self._kicks)(away, rng.choice(_KICK_STEPS)) or away
            start = self.start(away)
            self.objective.effort += 1  # a kick may lead nowhere, for ever
            if start is None:
                continue
            found = self.run(start, _PER_KICK, _STEPS_AFTER, self.objective.with_parts_of_units(start))
            if self._gains(found, best, _KICK_GAIN):
                gained = self.objective.effort
            best = found if self._gains(found, best) else best
        return best

    def simplified(self, policy: Policy) -> Policy:
        """A policy that gives nearly as much with less (`moves.simpler`)."""
        least, best = self.objective.tokens_per_s(policy) * (1 - _SIMPLER_LOSS), policy
        for _ in range(_MOST_SIMPLER):
            fitted = map(self.objective.fitted, simpler(best, self.objective.problem.workload))
            others = (tried for tried in fitted if tried is not None and tried != best)
            found = next((tried for tried in others if self.objective.tokens_per_s(tried) >= least), None)
            if found is None:
                break
            best = found
        return best

    def _gains(self, tried: Policy, best: Policy, ratio: float | None = None) -> bool:
        return self.objective.tokens_per_s(tried) > self.objective.tokens_per_s(best) * (ratio or self._gain)


def _shrunk(policy: Policy) -> Policy:
    count, size, slots = policy.num_gpu_batches, policy.gpu_batch_size, policy.weight_slots
    if count > 1:
        count = min(count - 1, int(count * 0.97))
    else:
        size = max(1, min(size - 1, int(size * 0.97)))
    fewer_slots = max(2, slots - 1) if slots else None
    return replace(in_batches(policy, size, count), weight_slots=fewer_slots)


def _alternating(first: Sequence[Policy], second: Sequence[Policy]) -> list[Policy]:
    both = (policy for pair in zip_longest(first, second) for policy in pair if policy)
    return list(dict.fromkeys(both))
