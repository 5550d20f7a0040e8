"""On-demand mode for sweeps of few tokens: only the experts that were routed to are moved, once that is known.

Runtime and planner decide by the same rule, sweep by sweep: the runtime with the routing that it has seen, the planner with
measured or uniform shares. A share is the probability that a token is routed to an expert; those of a layer add up to k.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cost_model.memory.allocation import KEPT_SLOTS, Allocation, entry_bytes, slot_bytes
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from policies.units import UnitId

#: Mean tokens of an expert beyond which on-demand mode is never used: nearly every expert is reached.
MOST_TOKENS_PER_EXPERT = 8
#: A cache of fewer experts has no entry to load into while another expert computes.
FEWEST_CACHED = 2
#: What a load of a single expert costs beyond its bytes, in bytes of the link, by the tier it is loaded from: about 100 µs of
#: dispatch, hand-over and latency at 20 and at 5 GB/s.
LOAD_BYTES = {"cpu": 2 << 20, "disk": 512 << 10}
#: On-demand mode is used when expected transfers are at most 2/3 of streaming every expert, because nothing overlaps them;
#: and it is left only beyond 4/5, because a change of mode drops what has been prefetched.
_PAYS, _STILL_PAYS = 2 / 3, 0.8


def touched(shares: np.ndarray, tokens: float) -> np.ndarray:
    """Probability of each expert that one of so many tokens is routed to it: 1 − (1 − share)^T."""
    missed: np.ndarray = (1.0 - np.minimum(shares, 1.0)) ** tokens
    return 1.0 - missed


def uniform_shares(arch: ModelArch) -> np.ndarray:
    """Shares ``[layers, E]`` under uniform routing."""
    return np.full((arch.num_layers, arch.num_experts), arch.top_k / arch.num_experts)


def borrowed_experts(arch: ModelArch, allocation: Allocation) -> int:
    """Experts that fit the slots which the cache borrows from the weight stream in on-demand mode."""
    return max(0, allocation.slots - KEPT_SLOTS) * slot_bytes(arch, allocation.placement) // entry_bytes(arch)


@dataclass(frozen=True, slots=True)
class OnDemand:
    """When on-demand mode is used for a model.

    Args:
        arch: the shape, with the units of the run.
        streamed: bool ``[layers, E]``, the experts that do not live on the compute device; none in dense layers.
        from_disk: part of them that lives on disk.
        cached: experts that the cache holds, borrowed slots included.
    """

    arch: ModelArch
    streamed: np.ndarray
    from_disk: float
    cached: int

    @classmethod
    def of(cls, arch: ModelArch, tier_of: Mapping[UnitId, str], cached: int) -> OnDemand:
        """From the tier of every unit."""
        streamed, on_disk = np.zeros((arch.num_layers, arch.num_experts), dtype=bool), 0
        for unit in units_of(arch):
            if unit.kind == "expert" and tier_of[unit.id] != "gpu" and not arch.is_dense(unit.layer):
                experts = unit.id.experts
                streamed[unit.layer, experts.start : experts.stop] = True
                on_disk += len(experts) * (tier_of[unit.id] == "disk")
        return cls(arch, streamed, on_disk / max(1, int(np.count_nonzero(streamed))), cached)

    @property
    def layers(self) -> frozenset[int]:
        """Layers that have streamed experts."""
        return frozenset(np.flatnonzero(self.streamed.any(axis=1)).tolist())

    def missed(self, shares: np.ndarray, tokens: float) -> float:
        """Experts that a sweep of so many tokens is expected to move, when those most used are cached.

        Args:
            shares: ``[layers, E]``.
        """
        expected = touched(shares, tokens)[self.streamed]
        left = len(expected) - self.cached
        if left <= 0:
            return 0.0
        return float(np.partition(expected, left - 1)[:left].sum())

    def pays(self, shares: np.ndarray, tokens: float, already: bool = False) -> bool:
        """Whether on-demand mode is used for a sweep of so many tokens.

        Args:
            already: it was used for the sweep before.
        """
        if tokens > self._most_considered:
            return False
        most = self._most_missed(_STILL_PAYS if already else _PAYS)
        return most > 0 and self.missed(shares, tokens) <= most

    def most_tokens(self, shares: np.ndarray | None) -> float:
        """Tokens of the largest sweep for which on-demand mode is used, the one before it not being so; 0 where it is for none.

        Under uniform routing each of the experts that are not cached is reached with the same 1 - (1 - k / E)^T, which is solved
        for T; else T is found by bisection.

        Args:
            shares: ``[layers, E]``; None: all are alike.
        """
        most, arch = self._most_missed(_PAYS), self.arch
        if not most or not self._most_considered:
            return 0.0
        if shares is None:
            left, share = int(np.count_nonzero(self.streamed)) - self.cached, arch.top_k / arch.num_experts
            if left <= most or share >= 1:
                return self._most_considered if left <= most else 0.0
            return min(self._most_considered, math.log1p(-most / left) / math.log1p(-share))
        return float(
            bisect_left(range(1, int(self._most_considered) + 1), True, key=lambda t: not self.pays(shares, t))
        )

    @property
    def _most_considered(self) -> float:
        """Tokens of the largest sweep for which the mode is considered."""
        return 0.0 if self.cached < FEWEST_CACHED else MOST_TOKENS_PER_EXPERT * self.arch.num_experts / self.arch.top_k

    def _most_missed(self, part: float) -> float:
        """Experts moved one by one that take as long as a part of all that are streamed."""
        alone = self.from_disk * LOAD_BYTES["disk"] + (1 - self.from_disk) * LOAD_BYTES["cpu"]
        whole = int(np.count_nonzero(self.streamed)) * self.arch.expert_bytes
        return part * whole / (self.arch.expert_bytes + alone) if whole else 0.0
