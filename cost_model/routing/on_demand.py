"""Sweeps of few tokens: routing leaves experts untouched, so what was routed to is moved when that is known, not all ahead.

Both the runtime and the planner decide by this, sweep by sweep: the one with the routing that it has seen, the other with
measured or uniform shares. A share is the probability that a token is routed to an expert; those of a layer add up to k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cost_model.memory.allocation import KEPT_SLOTS, Allocation, entry_bytes, slot_bytes
from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from policies.units import UnitId

#: Mean tokens of an expert beyond which a sweep is never on demand: hardly an expert is left out.
MOST_TOKENS_PER_EXPERT = 8
#: Fewer experts at hand leave nothing to load into while another computes.
FEWEST_AT_HAND = 2
#: What a load of its own costs beyond its bytes, in bytes of the link by the tier that it comes from: about 100 µs of dispatch,
#: hand-over and latency at 20 and at 5 GB/s.
LOAD_BYTES = {"cpu": 2 << 20, "disk": 512 << 10}
#: Part of the bytes of the streamed experts up to which moving them on demand pays, although nothing else runs meanwhile; and up to which
#: a run stays with it, because a change of mode costs what has been moved ahead.
_PAYS, _STILL_PAYS = 2 / 3, 0.8


def touched(shares: np.ndarray, tokens: float) -> np.ndarray:
    """Probability of each expert that one of so many tokens is routed to it: 1 − (1 − share)^T."""
    missed: np.ndarray = (1.0 - np.minimum(shares, 1.0)) ** tokens
    return 1.0 - missed


def uniform_shares(arch: ModelArch) -> np.ndarray:
    """Shares ``[layers, E]`` under uniform routing."""
    return np.full((arch.num_layers, arch.num_experts), arch.top_k / arch.num_experts)


def lent_experts(arch: ModelArch, allocation: Allocation) -> int:
    """Experts that fit the slots which the stream does not need while experts come on demand."""
    return max(0, allocation.slots - KEPT_SLOTS) * slot_bytes(arch, allocation.placement) // entry_bytes(arch)


@dataclass(frozen=True, slots=True)
class OnDemand:
    """When a model's experts are moved on demand.

    Args:
        arch: the shape, with the units of the run.
        streamed: bool ``[layers, E]``, the experts that do not live on the compute device; none in dense layers.
        from_disk: part of them that lives on disk.
        at_hand: experts that the cache holds, lent slots included.
    """

    arch: ModelArch
    streamed: np.ndarray
    from_disk: float
    at_hand: int

    @classmethod
    def of(cls, arch: ModelArch, tier_of: Mapping[UnitId, str], at_hand: int) -> OnDemand:
        """From the tier of every unit."""
        streamed, on_disk = np.zeros((arch.num_layers, arch.num_experts), dtype=bool), 0
        for unit in units_of(arch):
            if unit.kind == "expert" and tier_of[unit.id] != "gpu" and not arch.is_dense(unit.layer):
                experts = unit.id.experts
                streamed[unit.layer, experts.start : experts.stop] = True
                on_disk += len(experts) * (tier_of[unit.id] == "disk")
        return cls(arch, streamed, on_disk / max(1, int(np.count_nonzero(streamed))), at_hand)

    @property
    def layers(self) -> frozenset[int]:
        """Layers that have such experts."""
        return frozenset(np.flatnonzero(self.streamed.any(axis=1)).tolist())

    def missed(self, shares: np.ndarray, tokens: float) -> float:
        """Experts that a sweep of so many tokens is expected to move, when those most used are at hand.

        Args:
            shares: ``[layers, E]``.
        """
        expected = touched(shares, tokens)[self.streamed]
        left = len(expected) - self.at_hand
        if left <= 0:
            return 0.0
        return float(np.partition(expected, left - 1)[:left].sum())

    def pays(self, shares: np.ndarray, tokens: float, already: bool = False) -> bool:
        """Whether a sweep of so many tokens had better be on demand.

        Args:
            already: the sweep before was.
        """
        arch = self.arch
        if self.at_hand < FEWEST_AT_HAND or tokens * arch.top_k > MOST_TOKENS_PER_EXPERT * arch.num_experts:
            return False
        most = (_STILL_PAYS if already else _PAYS) * np.count_nonzero(self.streamed) * arch.expert_bytes
        alone = self.from_disk * LOAD_BYTES["disk"] + (1 - self.from_disk) * LOAD_BYTES["cpu"]
        return bool(most > 0 and self.missed(shares, tokens) * (arch.expert_bytes + alone) <= most)
