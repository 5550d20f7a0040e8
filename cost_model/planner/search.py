"""The best policy: programmes for what is continuous, rounding, and a climb for what is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from cost_model.planner.constraints import Fixed
from cost_model.planner.discrete import Search, choice_of, rounded
from cost_model.planner.hill_climb import Climb
from cost_model.planner.lp_model import Price
from cost_model.planner.objective import Judge
from cost_model.timing.problem import Problem
from policies.policy import Policy

#: Rounds of climbs: so many policies go on, the best of the round before, for so many judgements (`Judge.effort`) each.
_ROUNDS = ((8, 300), (4, 400))
#: Judgements for each of the finalists by pairs of moves.
_FINALISTS, _PER_FINALIST = 3, 1000
#: Then random kicks, for so many judgements a round, as long as a round gains so much.
_KICK_ROUNDS, _PER_KICK_ROUND, _KICK_GAIN = 4, 1000, 1.001
_QUICK = 350


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What a search has found.

    Attributes:
        policy, tokens_per_s: the best one, and what it gives.
        lp_tokens_per_s: the largest optimum of a linear programme.
        prices: of what binds in the programme of the policy's own choice, dearest first.
        programmes, evaluations: linear programmes that were solved, policies that were judged.
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
    search, judge = Search(problem, fixed), Judge(problem, fixed)
    found = search.run(effort)
    climb = Climb(judge)
    starts = [start for start in (climb.start(rounded(relaxed, problem, fixed)) for relaxed in found) if start]
    # Rounding can spoil what is best by the programme, so both orders count.
    pool = _alternating(_diverse(judge, [*starts, *smallest]), starts)
    for keep, each in _ROUNDS:
        pool = _ranked(judge, [*(climb.run(policy, effort * each) for policy in pool[:keep]), *pool[keep:]])
    finalists = [climb.run_pairs(policy, effort * _PER_FINALIST) for policy in pool[:_FINALISTS]]
    pool = _ranked(judge, [*finalists, *pool[_FINALISTS:]])
    for _ in range(_KICK_ROUNDS):
        best = climb.run_kicks(pool[:4], effort * _PER_KICK_ROUND)
        if judge.tokens_per_s(best) < judge.tokens_per_s(pool[0]) * _KICK_GAIN:
            break
        pool = _ranked(judge, [best, *pool])
    best = climb.plainer(best)
    own = search.solve(search.bracket(choice_of(best, problem), best.block_size))
    return Optimum(
        policy=best,
        tokens_per_s=judge.tokens_per_s(best),
        lp_tokens_per_s=max((relaxed.tokens_per_s for relaxed in [*found, *filter(None, [own])]), default=0.0),
        prices=own.prices if own else (),
        programmes=search.programmes,
        evaluations=judge.evaluations,
    )


def improved(problem: Problem, fixed: Fixed, policy: Policy) -> Optimum:
    """A good policy near a given one, quickly: for machines and models that differ little from those it was made for."""
    search, judge = Search(problem, fixed), Judge(problem, fixed)
    climb, own = Climb(judge), search.bracket(choice_of(policy, problem), policy.block_size)
    found = list(filter(None, [search.solve(choice) for choice in search.around(own)]))
    starts = [climb.start(rounded(relaxed, problem, fixed)) for relaxed in found]
    starts = _diverse(judge, [*filter(None, [*starts, judge.settled(policy)]), policy])[:2]
    best = max((climb.run(start, _QUICK) for start in starts), key=judge.tokens_per_s)
    return Optimum(
        policy=best,
        tokens_per_s=judge.tokens_per_s(best),
        lp_tokens_per_s=max((relaxed.tokens_per_s for relaxed in found), default=0.0),
        prices=(),
        programmes=search.programmes,
        evaluations=judge.evaluations,
    )


def _alternating(first: Sequence[Policy], second: Sequence[Policy]) -> list[Policy]:
    both = (policy for pair in zip_longest(first, second) for policy in pair if policy)
    return list(dict.fromkeys(both))


def _ranked(judge: Judge, policies: Iterable[Policy]) -> list[Policy]:
    return sorted(dict.fromkeys(policies), key=judge.tokens_per_s, reverse=True)


def _diverse(judge: Judge, policies: Iterable[Policy]) -> list[Policy]:
    """The best of each kind first, then the best of all."""
    ranked = _ranked(judge, policies)
    kinds: dict[tuple, Policy] = {}
    for policy in ranked:
        homes = policy.cache_gpu_percent > 1, policy.cache_cpu_percent > 1, policy.cpu_attention_percent > 50
        kinds.setdefault((policy.schedule, *homes), policy)
    return list(dict.fromkeys([*kinds.values(), *ranked]))
