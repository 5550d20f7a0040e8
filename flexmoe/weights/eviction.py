"""Which experts stay in the cache: every policy is a score per expert, and the expert of least score is evicted.

Frequencies are kept of all experts, those outside of the cache too, so an expert that is rarely used is not admitted in place
of one that is used more. They are counted in tokens, not in sweeps, so that a prompt of 100 tokens counts as much as 100 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Protocol

import numpy as np

from cost_model.model.arch import ModelArch
from cost_model.routing.on_demand import uniform_shares

EXPERT_CACHES = ("lfu", "lru", "static", "off")
#: Tokens after which a count has half its weight. Short enough that a change of the frequent experts is seen within a completion;
#: where they do not change, longer half-lives have 1 to 2 % more hits (`benchmarks/expert-cache.md`).
HALF_LIFE_TOKENS = 64
#: Bytes of the transient slots: loads of so many bytes at once keep the disk busy.
_TRANSIENT_BYTES = 8 << 20


def transient_slots(capacity: int, expert_bytes: int) -> int:
    """Transient slots, for experts not admitted to the cache, of an expert cache with room for ``capacity`` experts."""
    return max(1, min(max(2, ceil(_TRANSIENT_BYTES / expert_bytes)), capacity // 2))


class Usage:
    """How often each expert has been routed to recently.

    Args:
        arch: the shape.
        known: shares ``[layers, E]`` from another run, trusted like a half-life of tokens; None: routing is even at first.

    Attributes:
        shares: float64 ``[layers, E]``, probability that a token is routed to the expert.
    """

    def __init__(self, arch: ModelArch, known: np.ndarray | None = None):
        self._tokens = np.full(arch.num_layers, 1.0 if known is None else float(HALF_LIFE_TOKENS))
        self.shares = uniform_shares(arch) if known is None else known.copy()

    def add(self, layer: int, counts: np.ndarray, tokens: int) -> None:
        """Tokens of each expert of a layer, of ``tokens`` that were routed."""
        kept = self._tokens[layer] * 0.5 ** (tokens / HALF_LIFE_TOKENS)
        total = kept + tokens
        self.shares[layer] *= kept / total
        self.shares[layer] += counts / total
        self._tokens[layer] = total


class Eviction(Protocol):
    """A policy. ``scores``: ``[layers, E]``, kept up to date in place."""

    scores: np.ndarray

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of a layer were routed to."""


class LFU:
    """Least frequently used, with frequencies that decay: old uses count less than recent ones."""

    def __init__(self, usage: Usage):
        self.scores = usage.shares

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing to do: the scores are the frequencies, which `Usage.add` updates."""


class LRU:
    """Least recently used."""

    def __init__(self, usage: Usage):
        self.scores = np.zeros(usage.shares.shape)
        self._clock = 0

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of a layer were routed to."""
        self._clock += 1
        self.scores[layer, experts] = self._clock


class Static(LRU):
    """Those that are used most are never evicted; of the others the least recently used is.

    Args:
        shares: ``[layers, E]``, by which it is decided.
        streamed: bool ``[layers, E]``, the experts that the cache may hold.
        kept: experts that are never evicted.
    """

    def __init__(self, usage: Usage, shares: np.ndarray, streamed: np.ndarray, kept: int):
        super().__init__(usage)
        best = np.argsort(np.where(streamed, shares, -1.0), axis=None, kind="stable")[::-1][:kept]
        self._kept = np.zeros(shares.shape, dtype=bool)
        self._kept.flat[best] = True
        self.scores[self._kept] = np.inf

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of a layer were routed to."""
        super().used(layer, [e for e in experts if not self._kept[layer, e]])
