"""How many hits a cache of experts can have at best on a known trace, and how many any policy has on the same trace.

A trace is a sequence of *steps*: the experts that one layer of one sweep needs together. Everything is loaded on demand. MIN
may let what was missed pass by without a place in the cache; a replayed policy has to give it one, and the experts of a step do
not drive out one another unless the step is larger than the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

#: An expert; for instance (layer, number).
Key = Hashable
#: The experts needed together, each once.
Step = Sequence[Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What happened on a trace: experts looked up, found, and driven out. Every lookup that is no hit is a load."""

    lookups: int
    hits: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """Hits of a lookup; 0 for an empty trace."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def loads(self) -> int:
        """Experts that were brought."""
        return self.lookups - self.hits


class EvictionPolicy(Protocol):
    """Who makes room."""

    def touch(self, step: Step) -> None:
        """These experts are needed now; called once for each step, before it is served."""

    def victim(self, candidates: Collection[Key]) -> Key:
        """The one of these, which are in the cache, that is to go."""


class LeastScore:
    """A policy of the runtime's kind: the expert of the lowest score goes. Keys are (layer, number).

    Args:
        scores: ``[layers, E]``, kept up to date in place.
        seen: told of every step.
    """

    def __init__(self, scores: np.ndarray, seen: Callable[[Step], None]):
        self._scores, self._seen = scores, seen

    def touch(self, step: Step) -> None:
        """These experts are needed now."""
        self._seen(step)

    def victim(self, candidates: Collection[Key]) -> Key:
        """The one of these that is to go."""
        keys = list(candidates)
        return keys[int(self._scores[tuple(np.array(keys).T)].argmin())]


def replay(trace: Iterable[Step], capacity: int, policy: EvictionPolicy) -> Replay:
    """A policy on a trace.

    Args:
        capacity: experts that the cache has room for, at least one.
    """
    _check(capacity)
    cache: dict[Key, None] = {}  # in order, so that a policy that breaks ties by order is reproducible
    lookups = hits = evictions = 0
    for step in trace:
        policy.touch(step)
        missing = [key for key in step if key not in cache]
        lookups, hits = lookups + len(step), hits + len(step) - len(missing)
        kept = frozenset(step) if len(step) <= capacity else frozenset()
        for key in missing:
            if len(cache) == capacity:
                victim = policy.victim([other for other in cache if other not in kept] if kept else list(cache))
                del cache[victim]
                evictions += 1
            cache[key] = None
    return Replay(lookups=lookups, hits=hits, evictions=evictions)


def belady(trace: Iterable[Step], capacity: int) -> Replay:
    """The most hits that any policy can have: who is needed last, or never again, goes (Belady 1966, MIN).

    Takes about 2 µs and 170 bytes for each access.

    Args:
        capacity: experts that the cache has room for, at least one.
    """
    _check(capacity)
    steps = [tuple(step) for step in trace]
    upcoming = _next_uses(steps)
    next_use: dict[Key, int] = {}  # of the experts in the cache
    order = _LatestFirst(next_use)
    lookups = hits = evictions = 0
    for step, following in zip(steps, upcoming, strict=True):
        lookups, hits = lookups + len(step), hits + sum(key in next_use for key in step)
        order.enter(zip(step, following, strict=True))
        surplus = max(0, len(next_use) - capacity)
        order.forget(surplus)
        evictions += surplus
    return Replay(lookups=lookups, hits=hits, evictions=evictions)


class _LatestFirst:
    """The experts in the cache, those needed latest first; ``next_use`` is kept up to date."""

    def __init__(self, next_use: dict[Key, int]):
        self._next_use = next_use
        self._heap: list[tuple[int, int, Key]] = []
        self._entered = 0  # breaks ties, so that keys need no order

    def enter(self, uses: Iterable[tuple[Key, int]]) -> None:
        """These are in the cache, and needed next at these steps."""
        for key, at in uses:
            self._next_use[key] = at
            self._entered += 1
            heappush(self._heap, (-at, self._entered, key))

    def forget(self, count: int) -> None:
        """Drive out so many of those needed last. Entries that are no longer true are skipped."""
        while count:
            at, _, key = heappop(self._heap)
            if self._next_use.get(key) == -at:
                del self._next_use[key]
                count -= 1


def best_static(trace: Iterable[Step], capacity: int) -> Replay:
    """The experts that are needed most often, chosen with hindsight, there from the start and never driven out; all others pass by.

    Args:
        capacity: experts in the set, at least one.
    """
    _check(capacity)
    counts = Counter(key for step in trace for key in step)
    return Replay(lookups=counts.total(), hits=sum(count for _, count in counts.most_common(capacity)), evictions=0)


def _next_uses(steps: Sequence[Step]) -> list[list[int]]:
    """For every access the step that needs the same expert next; beyond the last step where none does."""
    later: dict[Key, int] = {}
    found: list[list[int]] = []
    for at in range(len(steps) - 1, -1, -1):
        found.append([later.get(key, len(steps)) for key in steps[at]])
        later.update(dict.fromkeys(steps[at], at))
    return found[::-1]


def _check(capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"a cache of {capacity} experts cannot hold one that is loaded: give it room for 1 at least")
