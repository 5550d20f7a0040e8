"""Single experts on the compute device: brought when a token has been routed to them, kept while there is room.

Weights are never written back: an evicted expert is dropped. Loads for the cache overtake the reads of the weight stream,
because the device waits for them.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexmoe.checkpoint.unit_layout import views
from flexmoe.system.device import Device
from flexmoe.weights.eviction import Eviction
from flexmoe.weights.expert_loader import ExpertLoader
from flexmoe.weights.slots import Fetch, Slot
from flexmoe.weights.store import as_compute


@dataclass(slots=True, eq=False)
class Entry(Slot):
    """Room for one expert; ``index`` is its place among the entries."""

    index: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Cached:
    """An expert, as (layer, number), in its entry or being loaded into it."""

    expert: tuple[int, int]
    entry: Entry
    fetch: Fetch


@dataclass(slots=True)
class CacheCounts:
    """What the cache did. ``load_s``: seconds from the request of an expert to its arrival, on CUDA until its copy has been
    issued, summed over the loads."""

    lookups: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    load_s: float = 0.0


class ExpertCache:
    """Experts cached on the compute device.

    Args:
        device: the compute device.
        loader: brings experts; the cache closes it.
        memory: uint8 on the compute device, cut into entries.
        entry_bytes: room that one expert takes.
        eviction: scores the experts; the one of least score is evicted.
        transient: transient slots, for experts not admitted to the cache.
        dtype: compute dtype.
        overlap: False starts a load only when its expert is next.

    Attributes:
        counts: what it did so far.
        stall_s: host seconds that the consumer waited for a load.
    """

    def __init__(
        self,
        device: Device,
        loader: ExpertLoader,
        memory: torch.Tensor,
        entry_bytes: int,
        eviction: Eviction,
        transient: int,
        dtype: torch.dtype,
        overlap: bool = True,
    ):
        self._device, self._loader, self._eviction, self._dtype = device, loader, eviction, dtype
        self._overlap, self._entry_bytes = overlap, entry_bytes
        now = device.record()  # kernels issued so far may still use the memory
        starts = range(0, len(memory) - entry_bytes + 1, entry_bytes)
        self._entries = [Entry(memory[at : at + entry_bytes], now, i) for i, at in enumerate(starts)]
        self._empty = list(reversed(self._entries))
        self._cached: dict[tuple[int, int], Cached] = {}
        # Of each entry: what it holds, the place of that among the scores, and whether the current layer needs it.
        self._holds: list[Cached | None] = [None] * len(self._entries)
        self._place = np.zeros(len(self._entries), dtype=np.int64)
        self._needed = np.zeros(len(self._entries), dtype=bool)
        self._transient = transient
        self._layer = -1
        self._hits: deque[Cached] = deque()
        self._loading: deque[Cached] = deque()
        self._missing: deque[int] = deque()
        self._failure: BaseException | None = None
        self.counts, self.stall_s = CacheCounts(), 0.0

    def __len__(self) -> int:
        """Experts that stay cached while others use the transient slots."""
        return len(self._entries) - self._transient

    def request(self, layer: int, experts: Sequence[int]) -> None:
        """The experts of a layer that `experts` is going to give; those that are not cached are loaded."""
        self.settle()
        self._eviction.used(layer, experts)
        self._layer = layer
        self._hits = deque(self._cached[layer, e] for e in experts if (layer, e) in self._cached)
        self._missing = deque(e for e in experts if (layer, e) not in self._cached)
        self._needed[:] = False
        self._needed[[hit.entry.index for hit in self._hits]] = True
        self.counts.lookups += len(experts)
        self.counts.hits += len(self._hits)
        if self._overlap:
            self._load_missing(len(experts))

    def experts(self) -> Iterator[dict[int, Mapping[str, torch.Tensor]]]:
        """Tensors in the compute dtype by number of the requested experts: first those that were cached, then those that have
        been loaded meanwhile, and so on. They may be used until the next item is taken.

        Raises:
            StorageError, DataError: a load failed.
        """
        while self._hits or self._loading or self._missing:
            if not self._hits and not self._loading:
                self._load_missing(1)
            source = self._hits or self._loading
            ready = list(source) if source is self._hits else self._loaded()
            yield {each.expert[1]: self._tensors(each) for each in ready}
            used = self._device.record()
            for each in ready:
                if source is self._loading:
                    self.counts.loads += 1
                    self.counts.load_s += each.fetch.seconds
                each.entry.freed = used
                self._needed[each.entry.index] = False
                source.popleft()
            if self._overlap:
                self._load_missing(len(self._missing))

    def _loaded(self) -> list[Cached]:
        """The experts whose loads are done, in the order of the requests up to the first that is not; at least the next one."""
        done = list(itertools.takewhile(lambda each: each.fetch.ready.is_set(), self._loading))
        return done or [self._loading[0]]

    def settle(self) -> None:
        """Wait for loads that were not consumed, those of an interrupted sweep; until the next request nothing is written."""
        for each in self._loading:
            each.fetch.ready.wait()
        self._loading.clear()
        self._missing.clear()

    def drain(self) -> None:
        """Wait until no load and no copy is under way."""
        self.settle()
        self._loader.settle()

    def close(self) -> None:
        """Finish what is under way; buffers and homes may be freed afterwards."""
        self._loader.close()

    def give_back(self, nbytes: int) -> None:
        """The owner of the first bytes of the memory reclaims them: experts that are cached there are dropped. After `drain`."""
        for entry in self._first(nbytes):
            held = self._holds[entry.index]
            if held is not None:
                self._drop(held)
                self._empty.append(entry)

    def borrow(self, nbytes: int) -> None:
        """The first bytes of the memory, given back before, are free again once the kernels that have been issued have run."""
        now = self._device.record()
        for entry in self._first(nbytes):
            entry.freed = now

    def _first(self, nbytes: int) -> list[Entry]:
        return self._entries[: -(-nbytes // self._entry_bytes)]

    def _load_missing(self, most: int) -> None:
        """Start at most so many loads, as long as there is room for them."""
        for _ in range(min(most, len(self._missing))):
            entry = self._entry_for(self._missing[0])
            if entry is None:
                return
            self._load(entry, self._missing.popleft())

    def _entry_for(self, expert: int) -> Entry | None:
        """The entry that an expert of the current layer is loaded into; None while it has to wait for one."""
        if self._empty:
            return self._empty.pop()
        scores = np.where(self._needed, np.inf, self._eviction.scores.reshape(-1)[self._place])
        index = int(scores.argmin())
        if self._needed[index]:  # all are; an infinite score may also be that of an expert that is never evicted
            index = int(self._needed.argmin())
            if self._needed[index]:
                return None
        is_better = scores[index] > self._eviction.scores[self._layer, expert]
        waits = len(self._loading) >= self._transient or (np.isinf(scores[index]) and (self._hits or self._loading))
        if is_better and waits:
            return None  # it bypasses the cache, through the entry of one that is about to be used
        held = self._holds[index]
        if held is not None:  # always, as no entry is empty
            self._drop(held)
        self.counts.evictions += 1
        return self._entries[index]

    def _drop(self, held: Cached) -> None:
        del self._cached[held.expert]
        self._holds[held.entry.index] = None

    def _load(self, entry: Entry, expert: int) -> None:
        fetch = self._loader.fetch(self._layer, expert, entry)
        held = Cached((self._layer, expert), entry, fetch)
        self._cached[held.expert] = self._holds[entry.index] = held
        self._place[entry.index] = self._layer * self._eviction.scores.shape[1] + expert
        self._needed[entry.index] = True
        self._loading.append(held)
        self._loader.load(self._layer, expert, fetch)

    def _tensors(self, held: Cached) -> Mapping[str, torch.Tensor]:
        """Of an expert that is cached or being loaded."""
        if self._failure is not None:  # the next call meets the same error
            raise self._failure
        fetch, start = held.fetch, time.perf_counter()
        fetch.ready.wait()
        self.stall_s += time.perf_counter() - start
        if fetch.error is not None:
            self._failure = fetch.error
            raise fetch.error
        if fetch.copied is not None:
            fetch.copied.wait(self._device.compute)
        return as_compute(views(held.entry.buffer, self._loader.places(*held.expert)), self._dtype)
