"""From a rounded policy to one that no neighbour beats: a bounded hill climb, judged by `evaluate`.

Where memory binds, one step alone often does not fit, or undoes what it gains: rows against slots, larger batches
against fewer rows. So a climb goes on by pairs of steps, and then from a few random steps away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from cost_model.planner.moves import Move, moves, resized
from cost_model.planner.objective import Judge, with_cache
from policies.policy import Policy

#: Step sizes, coarse to fine; the last ones are single rows and units where the counts are small.
STEPS = (1.0, 0.4, 0.15, 0.05, 0.015)
PAIR_STEPS = (0.4, 0.15, 0.05, 1.0)
_SCAN_ROWS = (0.25, 0.35, 0.5, 0.7, 0.85, 1, 1.15, 1.4, 2, 2.8, 4)
_SCAN_BATCHES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)
_GAIN = 1 + 1e-6
_SHRINKS = 10
_SEED, _PER_KICK = 0, 150
_KICKS, _KICK_STEPS, _STEPS_AFTER = (2, 3, 4), (1.0, 0.5, 0.25, 0.1), (0.3, 0.1, 0.03)
#: What a plainer policy may give away.
_PLAIN_LOSS = 0.0025


class Climb:
    """Climbs with one judge. An effort is a number of judgements (`Judge.effort`).

    Args:
        judge: what a policy is worth.
    """

    def __init__(self, judge: Judge):
        self.judge = judge
        self._moves = moves(judge.problem.workload)
        self._random = random.Random(_SEED)

    def start(self, policy: Policy) -> Policy | None:
        """The policy where it fits, else one with a few rows and slots fewer; None where those do not fit."""
        found = self.judge.settled(policy)
        for _ in range(_SHRINKS):
            if found is not None:
                return found
            policy = _shrunk(policy)
            found = self.judge.settled(policy)
        return found

    def run(self, policy: Policy, effort: float, steps: tuple[float, ...] = STEPS) -> Policy:
        """The best policy met on the way up by single moves."""
        best, last = policy, self.judge.effort + effort
        for step in steps:
            improved = True
            while improved and self.judge.effort < last:
                before = best
                for move in self._moves:
                    best = self._pursue(move, step, best, last)
                improved = best != before
        return best

    def run_pairs(self, policy: Policy, effort: float) -> Policy:
        """Goes on by other blocks and pairs of moves, and after each that helps by single moves."""
        last = self.judge.effort + effort
        best = self._better_block(policy, last)
        improved = True
        while improved and self.judge.effort < last:
            improved = False
            for step in PAIR_STEPS:
                found = self._best_pair(best, step, last)
                if found != best:
                    best, improved = self.run(found, max(0.0, last - self.judge.effort)), True
        return best

    def run_kicks(self, policies: Sequence[Policy], effort: float) -> Policy:
        """Goes on from a few moves at random away from the best, or from another one; the same ones in every plan."""
        rng, last = self._random, self.judge.effort + effort
        best = max(policies, key=self.judge.tokens_per_s)
        while self.judge.effort < last:
            kicked = best if rng.random() < 0.7 else rng.choice(policies)
            for _ in range(rng.choice(_KICKS)):
                kicked = rng.choice(self._moves).apply(kicked, rng.choice(_KICK_STEPS)) or kicked
            start = self.start(kicked)
            self.judge.effort += 1  # a kick may lead nowhere, for ever
            found = self.run(start, _PER_KICK, _STEPS_AFTER) if start else None
            if self._better(found, best):
                best = found
        return best

    def plainer(self, policy: Policy) -> Policy:
        """One that gives nearly as much with less: without the disk or a second way of attention, with fewer rows."""
        least = self.judge.tokens_per_s(policy) * (1 - _PLAIN_LOSS)
        best, changed = policy, True
        while changed:
            changed = False
            for simple in self._simplified(best):
                tried = self.judge.settled(simple)
                if tried is not None and tried != best and self.judge.tokens_per_s(tried) >= least:
                    best, changed = tried, True
                    break
        return best

    def _simplified(self, policy: Policy) -> Iterator[Policy]:
        gpu, cpu = policy.cache_gpu_percent, policy.cache_cpu_percent
        if gpu + cpu < 100 - 1e-6:
            yield with_cache(policy, gpu, 100 - gpu)
            kept = (gpu + cpu) / 100
            size = round(policy.gpu_batch_size * kept)
            fewer = size and resized(policy, size, policy.num_gpu_batches, "shares", self.judge.problem.workload)
            if fewer:  # the rows on disk are left out
                yield with_cache(fewer, gpu / kept, 100 - gpu / kept)
        if not cpu and policy.cpu_attention_percent:
            yield replace(policy, cpu_attention_percent=0.0)
        if cpu and policy.cpu_attention_percent not in (0.0, 100.0):
            yield replace(policy, cpu_attention_percent=100.0)
            yield replace(policy, cpu_attention_percent=0.0)
        if policy.act_gpu_percent < 100:
            yield replace(policy, act_gpu_percent=100.0, act_cpu_percent=0.0)
        if policy.weight_slots is not None:
            yield replace(policy, weight_slots=None)
        for move in self._moves:
            if move.fewer_rows:
                fewer = move.apply(policy, 0.1)
                if fewer is not None and fewer.block_size < policy.block_size:
                    yield fewer

    def _pursue(self, move: Move, step: float, best: Policy, last: float) -> Policy:
        """Repeats a move while it helps."""
        while self.judge.effort < last:
            tried = self._settled(move.apply(best, step))
            if not self._better(tried, best):
                return best
            best = tried
        return best

    def _better_block(self, policy: Policy, last: float) -> Policy:
        """The best of blocks of other sizes in other cuts, climbed on from."""
        best = policy
        for factor in _SCAN_ROWS:
            for count in (*_SCAN_BATCHES, policy.num_gpu_batches):
                size = round(policy.block_size * factor / count)
                if size < 1 or self.judge.effort >= last:
                    continue
                for hold in ("shares", "gpu"):
                    tried = self._settled(resized(policy, size, count, hold, self.judge.problem.workload))
                    if self._better(tried, best):
                        best = tried
        return best if best == policy else self.run(best, max(0.0, last - self.judge.effort))

    def _best_pair(self, policy: Policy, step: float, last: float) -> Policy:
        best = policy
        for first, second in combinations([move for move in self._moves if move.pairs], 2):
            if self.judge.effort >= last:
                break
            between = first.apply(policy, step)
            tried = self._settled(second.apply(between, step)) if between else None
            if self._better(tried, best):
                best = tried
        return best

    def _settled(self, policy: Policy | None) -> Policy | None:
        return self.judge.settled(policy) or self.judge.slowed(policy)

    def _better(self, tried: Policy | None, best: Policy) -> bool:
        return tried is not None and self.judge.tokens_per_s(tried) > self.judge.tokens_per_s(best) * _GAIN


def _shrunk(policy: Policy) -> Policy:
    count, size, slots = policy.num_gpu_batches, policy.gpu_batch_size, policy.weight_slots
    if count > 1:
        count = min(count - 1, int(count * 0.97))
    else:
        size = max(1, min(size - 1, int(size * 0.97)))
    fewer_slots = max(2, slots - 1) if slots else None
    return replace(policy, num_gpu_batches=count, gpu_batch_size=size, weight_slots=fewer_slots)
