"""Where the executor's weights come from: the weight stream, and for sweeps of few tokens the expert cache beside it.

With many tokens every expert is needed and all are streamed ahead of their use. With few, the stream goes on with what every
sweep needs, in a few of its slots, and the memory of the others holds single experts that come on demand; so does the device
memory beyond the slots, in which experts stay also while all are streamed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from cost_model.memory.allocation import Allocation
from cost_model.model.arch import ModelArch
from cost_model.routing.on_demand import FEWEST_AT_HAND, KEPT_SLOTS, OnDemand, entry_bytes
from flexmoe.weights.eviction import LFU, LRU, Eviction, Static, Usage, passing_places
from flexmoe.weights.expert_cache import CacheCounts, ExpertCache
from flexmoe.weights.expert_loader import ExpertLoader
from flexmoe.weights.store import WeightStore
from flexmoe.weights.stream import WeightStream
from flexmoe.weights.transfers import needs_staging
from policies.schedule import SweepUnits
from policies.units import UnitId

log = logging.getLogger(__name__)


class WeightFeed:
    """Brings weights to the compute device.

    Args:
        store: homes of the units.
        arch: the shape, in the units of the run.
        units: the same units as the schedule wants them.
        counts: slots and room of the cache.
        kind: one of `eviction.EXPERT_CACHES`.
        known: shares ``[layers, E]`` of another run, or None; a static cache needs them.
        overlap: False starts a transfer only when it is asked for.

    Attributes:
        trace: where it is a list, the (layer, experts) of every request are added to it (benchmarks).
    """

    def __init__(
        self,
        store: WeightStore,
        arch: ModelArch,
        units: SweepUnits,
        counts: Allocation,
        *,
        kind: str = "lfu",
        known: np.ndarray | None = None,
        overlap: bool = True,
    ):
        self._kind, self._entry_bytes = kind, entry_bytes(arch)
        self._all = [step.unit for step in units.streamed()]
        room = counts.cache_experts * self._entry_bytes
        self._stream = WeightStream(
            store, self._all, counts.slots, counts.staging_slots, overlap=overlap, room_bytes=room
        )
        self._kept = min(KEPT_SLOTS, counts.slots) * self._stream.slot_bytes
        self._lent = counts.slots * self._stream.slot_bytes - self._kept
        at_hand = (self._lent + room) // self._entry_bytes if kind != "off" else 0
        self._rule, self._usage = OnDemand.of(arch, store.tier_of, at_hand), Usage(arch, known)
        self._always = [step.unit for step in units.streamed(self._rule.layers)]
        staged = sum(needs_staging(store, unit) for unit in self._always)
        self._kept_staging = min(KEPT_SLOTS, staged, max(0, len(self._stream.staging) - 1))
        self._cache: ExpertCache | None = None
        if at_hand >= FEWEST_AT_HAND and self._rule.layers:
            streamed = [step.unit for layer in units.experts for step in layer if step.tier != "gpu"]
            staging = self._stream.staging[self._kept_staging :]
            self._loader = ExpertLoader(store, streamed, self._stream.staged, staging)
            passing = passing_places(at_hand, self._entry_bytes)
            eviction = _eviction(kind, self._usage, known, self._rule.streamed, at_hand - passing)
            about = {"passing": passing, "dtype": store.dtype, "overlap": overlap}
            memory = self._stream.memory[self._kept :]
            self._cache = ExpertCache(store.device, self._loader, memory, self._entry_bytes, eviction, **about)
        self._on_demand, self._in_sweep, self._on_demand_sweeps = False, False, 0
        self.trace: list[tuple[int, list[int]]] | None = None

    @property
    def stall_s(self) -> float:
        """Host seconds that computation waited for weights."""
        return self._stream.stall_s + (self._cache.stall_s if self._cache else 0.0)

    def begin(self, tokens: int) -> frozenset[int]:
        """A sweep of so many tokens begins; returns the layers whose streamed experts come on demand."""
        wanted = self._cache is not None and self._rule.pays(self._usage.shares, tokens, already=self._on_demand)
        if wanted != self._on_demand or self._in_sweep:  # the last sweep was broken off: the stream is somewhere in it
            self._change(wanted)
        self._in_sweep = True
        self._on_demand_sweeps += wanted
        return self._rule.layers if wanted else frozenset()

    def end(self) -> None:
        """The sweep is over, and the stream at the beginning of the next."""
        self._in_sweep = False

    def get(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """Tensors of a unit that every sweep needs, or that is streamed with all others, as `WeightStream.get`."""
        return self._stream.get(unit)

    def release(self, unit: UnitId) -> None:
        """The last kernel that reads ``unit`` has been issued."""
        self._stream.release(unit)

    def routed(self, layer: int, counts: Sequence[int], tokens: int) -> None:
        """Tokens that each expert of a layer got, of so many that were routed."""
        if self._cache is not None:
            self._usage.add(layer, np.array(counts), tokens)
            self._counts = counts

    def request(self, layer: int) -> None:
        """Ask for the streamed experts that this layer has been routed to."""
        streamed = self._rule.streamed[layer]
        experts = [e for e, count in enumerate(self._counts) if count and streamed[e]]
        self._cache.request(layer, experts)
        if self.trace is not None:
            self.trace.append((layer, experts))

    def experts(self) -> Iterator[dict[int, Mapping[str, torch.Tensor]]]:
        """Tensors by number of some of them at a time; they may be used until the next ones are asked for."""
        return self._cache.experts()

    def metrics(self) -> dict:
        """What the cache did: ``experts`` that can stay, and per expert that was loaded the mean seconds it took."""
        counts = self._cache.counts if self._cache else CacheCounts()
        return {
            "policy": self._kind,
            "experts": len(self._cache) if self._cache else 0,
            "on_demand_sweeps": self._on_demand_sweeps,
            "lookups": counts.lookups,
            "hits": counts.hits,
            "hit_rate": counts.hits / counts.lookups if counts.lookups else 0.0,
            "loads": counts.loads,
            "evictions": counts.evictions,
            "mean_load_s": counts.load_s / counts.loads if counts.loads else 0.0,
        }

    def close(self) -> None:
        """Stop after the transfers under way."""
        self._stream.close()
        if self._cache is not None:
            self._loader.close()

    def _change(self, on_demand: bool) -> None:
        """Between two sweeps, which is rare: what the stream has brought ahead is dropped."""
        log.debug("experts come %s from here on", "on demand" if on_demand else "all")
        if self._cache is not None:
            self._cache.settle()
            self._loader.settle()
        if on_demand:
            self._stream.restart(self._always, KEPT_SLOTS, self._kept_staging)
            self._cache.take_back(self._lent)
        else:
            if self._cache is not None:
                self._cache.lend(self._lent)
            self._stream.restart(self._all)
        self._on_demand = on_demand


def _eviction(kind: str, usage: Usage, known: np.ndarray | None, streamed: np.ndarray, kept: int) -> Eviction:
    if kind == "lfu":
        return LFU(usage)
    return LRU(usage) if kind == "lru" else Static(usage, known, streamed, kept)
