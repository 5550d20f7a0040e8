"""Belady's MIN is the most that any policy can have; policies replayed on the same trace have no more."""

import random
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from scripts.support.belady import LeastScore, Replay, belady, best_static, replay


class LRU:
    def __init__(self):
        self.clock, self.used = 0, {}

    def touch(self, step):
        self.clock += 1
        self.used.update(dict.fromkeys(step, self.clock))

    def victim(self, candidates):
        return min(candidates, key=self.used.__getitem__)


class Random:
    def __init__(self, seed):
        self.random = random.Random(seed)

    def touch(self, step):
        pass

    def victim(self, candidates):
        return self.random.choice(sorted(candidates))


def most_hits(trace, capacity):
    """Every choice of what the cache holds after each step."""

    @cache
    def best(at, held):
        if at == len(trace):
            return 0
        step = frozenset(trace[at])
        known, room = held | step, min(capacity, len(held | step))
        return len(held & step) + max(best(at + 1, frozenset(some)) for some in combinations(known, room))

    return best(0, frozenset())


def random_trace(rng, keys, steps, largest):
    return [tuple(rng.sample(range(keys), rng.randint(1, largest))) for _ in range(steps)]


@pytest.mark.parametrize("seed", range(150))
def test_min_is_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    keys = rng.randint(2, 6)
    trace = random_trace(rng, keys, rng.randint(1, 9), rng.randint(1, keys))
    capacity = rng.randint(1, 4)
    found = belady(trace, capacity)
    assert found.hits == most_hits(tuple(trace), capacity)
    assert found.lookups == sum(map(len, trace)) and found.loads - found.evictions <= capacity


@pytest.mark.parametrize("policy", [LRU, lambda: Random(1)], ids=["lru", "random"])
@pytest.mark.parametrize("capacity", [1, 3, 12, 40, 100])
def test_no_policy_has_more_hits_than_min(policy, capacity):
    trace = random_trace(random.Random(7), 40, 500, 8)
    found, best = replay(trace, capacity, policy()), belady(trace, capacity)
    assert found.lookups == best.lookups and found.hits <= best.hits
    assert found.evictions == max(0, found.loads - capacity)
    if capacity >= 40:
        assert found.loads == best.loads == 40


def test_the_experts_of_a_step_do_not_drive_out_one_another():
    trace = [("a", "b"), ("c", "a"), ("a", "b", "c")]
    asked = []

    class Asking(LRU):
        def victim(self, candidates):
            asked.append(sorted(candidates))
            return super().victim(candidates)

    assert replay(trace, 3, Asking()) == Replay(lookups=7, hits=4, evictions=0)
    assert replay(trace, 2, Asking()).hits == 1 + 2 and asked[0] == ["b"]
    assert belady(trace, 2).hits == 3


def test_a_step_larger_than_the_cache_finds_what_was_cached():
    assert belady([(1, 2), (3, 1, 2), (2,)], 2) == Replay(lookups=6, hits=3, evictions=1)
    assert replay([(1, 2), (3, 1, 2)], 2, LRU()).hits == 2


def test_the_best_static_set_has_the_experts_that_were_needed_most():
    trace = [(1, 2), (1, 3), (1, 4), (2, 1)]
    assert [best_static(trace, capacity).hits for capacity in (1, 2, 3, 9)] == [4, 6, 7, 8]
    assert best_static([], 3).hit_rate == 0.0


def test_a_policy_of_scores_is_replayed_like_the_runtimes():
    trace = [
        [(layer, number) for number in step] for step in random_trace(random.Random(3), 6, 60, 3) for layer in (0, 1)
    ]
    counts = np.zeros((2, 6))

    def seen(step):
        for key in step:
            counts[key] += 1

    found = replay(trace, 5, LeastScore(counts, seen))
    assert counts.sum() == found.lookups and 0 < found.hits <= belady(trace, 5).hits
    assert Counter(key for step in trace for key in step) == dict(np.ndenumerate(counts))


def test_favourites_that_change_cost_the_static_set_half_and_min_little():
    first, second = [(1, 2)] * 50, [(3, 4)] * 50
    assert best_static(first + second, 2).hit_rate == 0.5
    assert belady(first + second, 2).hits == 196


def test_a_cache_without_room_is_refused():
    for refused in (lambda: belady([], 0), lambda: best_static([], 0), lambda: replay([], 0, LRU())):
        with pytest.raises(ValueError, match="room for 1"):
            refused()
