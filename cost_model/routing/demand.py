"""Which experts the tokens of a sweep reach under a policy, and what a sweep on demand moves of them.

Everything is an expectation: under uniform routing, or under the shares that were measured in a run. Arrays are made only
for sweeps of so few tokens that they may be on demand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from cost_model.memory.allocation import Allocation, residency, single_expert_bytes
from cost_model.model.arch import ModelArch

if TYPE_CHECKING:
    import numpy as np

    from cost_model.routing.on_demand import OnDemand


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a sweep on demand is expected to move and to compute.

    Attributes:
        layers: of whose streamed experts only those are moved that were routed to.
        disk_layers: how many of them have some on disk.
        host_bytes, disk_bytes: moved from host memory and from disk, in the whole sweep.
        missed: experts that are moved, in the whole sweep.
        streamed, resident: experts that are reached, in the whole sweep; those that live on the compute device apart.
        resident_units: units of the latter, reached or not.
    """

    layers: frozenset[int]
    disk_layers: int
    host_bytes: float
    disk_bytes: float
    missed: float
    streamed: float
    resident: float
    resident_units: int


class Routing:
    """What is known of the experts that tokens are routed to.

    Args:
        arch: the shape, with the units of the run.
        allocation: from `allocate`.
        shares: ``[layers, E]``, the probability that a token is routed to an expert; None: all are alike.
        on_demand: a sweep may be.
    """

    def __init__(
        self, arch: ModelArch, allocation: Allocation, shares: np.ndarray | None = None, on_demand: bool = True
    ):
        self._arch, self._allocation, self._shares, self._may = arch, allocation, shares, on_demand
        self._known: dict[tuple[float, bool], Demand | None] = {}

    def touched(self, tokens: float) -> float:
        """Experts of a mean sparse layer that so many tokens reach."""
        if self._shares is None:
            return self._arch.expected_experts_touched(tokens)
        from cost_model.routing.on_demand import touched

        return float(touched(self._shares, tokens).sum()) / max(1, self._arch.num_layers - len(self._arch.dense_layers))

    def on_demand(self, tokens: float, already: bool = False) -> Demand | None:
        """What a sweep of so many tokens moves and computes if it is on demand; None where it is not.

        Args:
            already: the sweep before was.
        """
        from cost_model.routing.on_demand import MOST_TOKENS_PER_EXPERT

        if not self._may or tokens * self._arch.top_k > MOST_TOKENS_PER_EXPERT * self._arch.num_experts:
            return None
        key = tokens, already
        if key not in self._known:
            self._known[key] = self._demand(tokens, already)
        return self._known[key]

    @cached_property
    def most_on_demand(self) -> float:
        """Tokens of the largest sweep that is on demand, the one before it not being so; 0 where none is."""
        return self._chooser.most_tokens(self._shares) if self._may else 0.0

    def streamed(self, tier: str) -> tuple[int, int]:
        """(units, bytes) of a tier's experts that no sweep on demand streams."""
        return self._experts.between(*self._allocation.placement.stretch(tier))

    @property
    def _experts(self) -> _SparseExperts:
        return _SparseExperts.of(self._arch, self._allocation.placement.residency.expert_order)

    @cached_property
    def _chooser(self) -> OnDemand:
        import numpy as np

        from cost_model.routing.on_demand import OnDemand, borrowed_experts

        allocation, places = self._allocation, self._experts.places
        cached = borrowed_experts(self._arch, allocation) + allocation.cache_experts
        streamed = places >= allocation.placement.gpu_end
        on_disk_count = int(np.count_nonzero(places >= allocation.placement.cpu_end))
        from_disk = on_disk_count / max(1, int(np.count_nonzero(streamed)))
        return OnDemand(self._arch, streamed, from_disk, cached)

    def _demand(self, tokens: float, already: bool) -> Demand | None:
        import numpy as np

        from cost_model.routing.on_demand import touched, uniform_shares

        allocation, places = self._allocation, self._experts.places
        streamed = self._chooser.streamed
        shares = uniform_shares(self._arch) if self._shares is None else self._shares
        if not self._chooser.pays(shares, tokens, already):
            return None
        reached, on_disk = touched(shares, tokens), places >= allocation.placement.cpu_end
        all_streamed, all_on_disk = float(reached[streamed].sum()), float(reached[on_disk].sum())
        missed = self._chooser.missed(shares, tokens)
        missed_bytes = missed * single_expert_bytes(self._arch)
        disk_share = all_on_disk / all_streamed if all_streamed else 0.0
        return Demand(
            layers=self._chooser.layers,
            disk_layers=int(np.count_nonzero(on_disk.any(axis=1))),
            host_bytes=missed_bytes * (1 - disk_share),
            disk_bytes=missed_bytes * disk_share,
            missed=missed,
            streamed=all_streamed,
            resident=float(reached[(places >= 0) & ~streamed].sum()),
            resident_units=self._experts.between(0, allocation.placement.gpu_end)[0],
        )


@dataclass(frozen=True, slots=True)
class _SparseExperts:
    """The experts of layers that have several, in the order in which units become resident.

    ``places``: int ``[layers, E]``, the place of each expert's unit in that order; -1 in dense layers. ``units_before``,
    ``bytes_before``: of such units, before each place.
    """

    places: np.ndarray
    units_before: tuple[int, ...]
    bytes_before: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, arch: ModelArch, expert_order: tuple[tuple[int, ...], ...] | None) -> _SparseExperts:
        import numpy as np

        places, sizes = np.full((arch.num_layers, arch.num_experts), -1), []
        for place, unit in enumerate(residency(arch, expert_order).order):
            sparse = unit.kind == "expert" and not arch.is_dense(unit.layer)
            sizes.append(unit.stored_bytes if sparse else 0)
            if sparse:
                experts = unit.id.experts
                places[unit.layer, experts.start : experts.stop] = place
        units = accumulate((size > 0 for size in sizes), initial=0)
        return cls(places, tuple(units), tuple(accumulate(sizes, initial=0)))

    def between(self, first: int, last: int) -> tuple[int, int]:
        """(units, bytes) at places [first, last)."""
        units, sizes = self.units_before, self.bytes_before
        return units[last] - units[first], sizes[last] - sizes[first]
