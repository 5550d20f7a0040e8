"""Where the executor's weights come from: the weight stream, and in on-demand mode the expert cache beside it.

With many tokens every expert is needed and all are streamed ahead of their use. With few, the stream brings what every sweep
needs through a few of its slots, and the expert cache borrows the memory of the others for single experts, which are loaded
when a token is routed to them. Device memory beyond the slots is the cache's own; its experts stay there also while all are
streamed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from cost_model.memory.allocation import KEPT_SLOTS, Allocation, entry_bytes
from cost_model.model.arch import ModelArch
from cost_model.routing.on_demand import FEWEST_CACHED, OnDemand
from flexmoe.errors import UsageError
from flexmoe.weights.eviction import LFU, LRU, Eviction, Static, Usage, transient_slots
from flexmoe.weights.expert_cache import CacheCounts, ExpertCache
from flexmoe.weights.expert_loader import ExpertLoader
from flexmoe.weights.slots import needs_staging
from flexmoe.weights.store import WeightStore
from flexmoe.weights.stream import WeightStream
from policies.schedule import SweepUnits
from policies.units import UnitId

log = logging.getLogger(__name__)


class WeightFeed:
    """Brings weights to the compute device, from `start` to `close`.

    Args:
        store: homes of the units.
        arch: the shape, in the units of the run.
        units: the same units as the schedule wants them.
        allocation: slots and room of the cache.
        kind: one of `eviction.EXPERT_CACHES`.
        known: shares ``[layers, E]`` of another run, or None; a static cache needs them.
        overlap: False starts a transfer only when it is requested.

    Attributes:
        trace: where it is a list, the (layer, experts) of every request are added to it (benchmarks).
    """

    def __init__(
        self,
        store: WeightStore,
        arch: ModelArch,
        units: SweepUnits,
        allocation: Allocation,
        *,
        kind: str = "lfu",
        known: np.ndarray | None = None,
        overlap: bool = True,
    ):
        self._kind, own_bytes = kind, allocation.cache_experts * entry_bytes(arch)
        self._all = [step.unit for step in units.streamed()]
        self._stream = WeightStream(
            store, self._all, allocation.slots, allocation.staging_slots, overlap=overlap, room_bytes=own_bytes
        )
        self._borrowed_bytes = max(0, allocation.slots - KEPT_SLOTS) * self._stream.slot_bytes
        capacity = (self._borrowed_bytes + own_bytes) // entry_bytes(arch) if kind != "off" else 0
        self._rule, self._usage = OnDemand.of(arch, store.tier_of, capacity), Usage(arch, known)
        self._always = [step.unit for step in units.streamed(self._rule.layers)]
        self._kept_staging = self._staging_of_the_stream(store)
        self._cache: ExpertCache | None = None
        if capacity >= FEWEST_CACHED and self._rule.layers:
            self._cache = self._make_cache(store, units, allocation.slots, capacity, entry_bytes(arch), known, overlap)
        self._counts: Sequence[int] = ()
        self._on_demand, self._in_sweep, self._on_demand_sweeps = False, False, 0
        self.trace: list[tuple[int, list[int]]] | None = None

    def _staging_of_the_stream(self, store: WeightStore) -> int:
        """Staging slots that the stream keeps in on-demand mode: one at least where it needs them, and all but one at most
        where loads of single experts need them too. Where both do, two units or more are staged, and so there are two slots."""
        always = sum(needs_staging(store, unit) for unit in self._always)
        loads = any(needs_staging(store, unit) for unit in set(self._all).difference(self._always))
        return min(KEPT_SLOTS, always, len(self._stream.staging) - loads)

    def _make_cache(
        self,
        store: WeightStore,
        units: SweepUnits,
        slots: int,
        capacity: int,
        entry_bytes: int,
        known: np.ndarray | None,
        overlap: bool,
    ) -> ExpertCache:
        """The cache over the slots that it borrows and the room behind them; the stream keeps the first slots."""
        streamed = [step.unit for layer in units.experts for step in layer if step.tier != "gpu"]
        staging = self._stream.staging[self._kept_staging :]
        transient = transient_slots(capacity, entry_bytes)
        kept_bytes = slots * self._stream.slot_bytes - self._borrowed_bytes
        return ExpertCache(
            store.device,
            ExpertLoader(store, streamed, self._stream.staged, staging),
            self._stream.memory[kept_bytes:],
            entry_bytes,
            _eviction(self._kind, self._usage, known, self._rule.streamed, capacity - transient),
            transient=transient,
            dtype=store.dtype,
            overlap=overlap,
        )

    def start(self) -> None:
        """Start to prefetch units."""
        self._stream.start(self._all)

    @property
    def stall_s(self) -> float:
        """Host seconds that computation waited for weights."""
        return self._stream.stall_s + (self._cache.stall_s if self._cache else 0.0)

    def begin(self, tokens: int) -> frozenset[int]:
        """A sweep of so many tokens begins; returns the layers whose streamed experts are loaded on demand."""
        wanted = self._cache is not None and self._rule.pays(self._usage.shares, tokens, already=self._on_demand)
        if wanted != self._on_demand or self._in_sweep:  # the last sweep was interrupted: the stream is somewhere in it
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

    def put_aside(self, unit: UnitId) -> None:
        """Another half-block uses ``unit`` later."""
        self._stream.put_aside(unit)

    def release(self, unit: UnitId) -> None:
        """The last kernel that reads ``unit`` has been issued."""
        self._stream.release(unit)

    def routed(self, layer: int, counts: Sequence[int], tokens: int) -> None:
        """Tokens that each expert of a layer got, of so many that were routed."""
        if self._cache is not None:
            self._usage.add(layer, np.array(counts), tokens)
            self._counts = counts

    def request(self, layer: int) -> None:
        """Request the streamed experts that this layer has been routed to."""
        streamed = self._rule.streamed[layer]
        experts = [e for e, count in enumerate(self._counts) if count and streamed[e]]
        self._on_demand_cache().request(layer, experts)
        if self.trace is not None:
            self.trace.append((layer, experts))

    def experts(self) -> Iterator[dict[int, Mapping[str, torch.Tensor]]]:
        """Tensors by number of the requested experts, some at a time; they may be used until the next item is taken."""
        return self._on_demand_cache().experts()

    def _on_demand_cache(self) -> ExpertCache:
        if self._cache is None:
            raise RuntimeError("single experts were requested, but this run streams all of them")
        return self._cache

    def metrics(self) -> dict[str, str | int | float]:
        """What the cache did: ``experts`` that it can keep, and the mean seconds of a load."""
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
            self._cache.close()

    def _change(self, on_demand: bool) -> None:
        """Between two sweeps, which is rare: what the stream has prefetched is dropped."""
        log.debug("experts are %s from now on", "loaded on demand" if on_demand else "all streamed")
        if self._cache is not None:
            self._cache.drain()
        if on_demand and self._cache is not None:
            self._stream.start(self._always, KEPT_SLOTS, self._kept_staging)
            self._cache.borrow(self._borrowed_bytes)
        else:
            if self._cache is not None:
                self._cache.give_back(self._borrowed_bytes)
            self._stream.start(self._all)
        self._on_demand = on_demand


def _eviction(kind: str, usage: Usage, known: np.ndarray | None, streamed: np.ndarray, kept: int) -> Eviction:
    if kind == "lfu":
        return LFU(usage)
    if kind == "lru":
        return LRU(usage)
    if known is None:
        raise UsageError("a static expert cache keeps what another run used most; give its expert usage too")
    return Static(usage, known, streamed, kept)
