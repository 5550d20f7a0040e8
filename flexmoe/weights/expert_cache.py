"""Single experts on the compute device: brought when a token has been routed to them, kept while there is room.

Weights are never written back: to evict an expert is to forget it. What is asked for here overtakes what the weight stream
reads ahead, because the device waits for it.
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
from flexmoe.weights.store import as_compute
from flexmoe.weights.transfers import Fetch, Slot


@dataclass(slots=True, eq=False)
class Entry(Slot):
    """Room for one expert: its place among the others, the (layer, number) that it holds, and the fetch that brought it."""

    index: int = 0
    expert: tuple[int, int] | None = None
    fetch: Fetch | None = None


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
    """The experts at hand.

    Args:
        device: the compute device.
        loader: brings experts.
        memory: uint8 on the compute device, cut into entries.
        entry_bytes: room that one expert takes.
        eviction: who makes room.
        passing: places that experts pass through which deserve to stay less than all that are at hand.
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
        passing: int,
        dtype: torch.dtype,
        overlap: bool = True,
    ):
        self._device, self._loader, self._eviction, self._dtype = device, loader, eviction, dtype
        self._overlap, self._entry_bytes = overlap, entry_bytes
        now = device.record()  # the memory may have been somebody else's until here
        starts = range(0, len(memory) - entry_bytes + 1, entry_bytes)
        self._entries = [Entry(memory[at : at + entry_bytes], now, i) for i, at in enumerate(starts)]
        self._empty = list(reversed(self._entries))
        self._of: dict[tuple[int, int], Entry] = {}
        # Of each entry: the place of its expert among the scores, and whether the current layer needs it.
        self._place = np.zeros(len(self._entries), dtype=np.int64)
        self._needed = np.zeros(len(self._entries), dtype=bool)
        self._passing = passing
        self._layer = -1
        self._hits: deque[Entry] = deque()
        self._coming: deque[Entry] = deque()
        self._missing: deque[int] = deque()
        self._failure: BaseException | None = None
        self.counts, self.stall_s = CacheCounts(), 0.0

    def __len__(self) -> int:
        """Experts that can stay while others pass by."""
        return len(self._entries) - self._passing

    def request(self, layer: int, experts: Sequence[int]) -> None:
        """The experts of a layer that `experts` is going to give; those that are not at hand are asked for."""
        self.settle()
        self._eviction.used(layer, experts)
        self._layer = layer
        self._hits = deque(self._of[layer, e] for e in experts if (layer, e) in self._of)
        self._missing = deque(e for e in experts if (layer, e) not in self._of)
        self._needed[:] = False
        self._needed[[entry.index for entry in self._hits]] = True
        self.counts.lookups += len(experts)
        self.counts.hits += len(self._hits)
        if self._overlap:
            self._ask(len(experts))

    def experts(self) -> Iterator[dict[int, Mapping[str, torch.Tensor]]]:
        """Tensors in the compute dtype by number of the requested experts: those at hand, then those that have come meanwhile,
        and so on. They may be used until the next ones are asked for.

        Raises:
            StorageError, DataError: a load failed.
        """
        while self._hits or self._coming or self._missing:
            if not self._hits and not self._coming:
                self._ask(1)
            entries = list(self._hits) or self._arrived()
            yield {entry.expert[1]: self._tensors(entry) for entry in entries}
            used, taken = self._device.record(), self._hits or self._coming
            for entry in entries:
                if taken is self._coming:
                    self.counts.loads += 1
                    self.counts.load_s += entry.fetch.seconds
                entry.freed = used
                self._needed[entry.index] = False
                taken.popleft()
            if self._overlap:
                self._ask(len(self._missing))

    def _arrived(self) -> list[Entry]:
        """The experts that are there, as far as they come in the order in which they were asked for; the next one at least."""
        there = list(itertools.takewhile(lambda entry: entry.fetch.ready.is_set(), self._coming))
        return there or [self._coming[0]]

    def settle(self) -> None:
        """Wait for loads that nobody took, those of a sweep that was broken off; nothing is written then until the next request."""
        for entry in self._coming:
            entry.fetch.ready.wait()
        self._coming.clear()
        self._missing.clear()

    def lend(self, nbytes: int) -> None:
        """The first bytes of the memory are used otherwise from now on: what lies there is forgotten. Nothing may be on its way."""
        for entry in self._first(nbytes):
            if entry.expert is not None:
                del self._of[entry.expert]
                entry.expert = None
                self._empty.append(entry)

    def take_back(self, nbytes: int) -> None:
        """What was lent is free again once the kernels that have been issued have run."""
        now = self._device.record()
        for entry in self._first(nbytes):
            entry.freed = now

    def _first(self, nbytes: int) -> list[Entry]:
        return self._entries[: -(-nbytes // self._entry_bytes)]

    def _ask(self, most: int) -> None:
        """Start so many loads, as long as there is room for them."""
        for _ in range(min(most, len(self._missing))):
            entry = self._room(self._missing[0])
            if entry is None:
                return
            self._load(entry, self._missing.popleft())

    def _room(self, expert: int) -> Entry | None:
        """The entry that an expert of the current layer goes to; None while it has to wait for one."""
        if self._empty:
            return self._empty.pop()
        scores = np.where(self._needed, np.inf, self._eviction.scores.reshape(-1)[self._place])
        index = int(scores.argmin())
        if self._needed[index]:  # all are; an infinite score may be that of an expert that is to stay
            index = int(self._needed.argmin())
            if self._needed[index]:
                return None
        is_better = scores[index] > self._eviction.scores[self._layer, expert]
        waits = len(self._coming) >= self._passing or (np.isinf(scores[index]) and (self._hits or self._coming))
        if is_better and waits:
            return None  # it passes by, through the place of one that is about to be used
        entry = self._entries[index]
        del self._of[entry.expert]
        self.counts.evictions += 1
        return entry

    def _load(self, entry: Entry, expert: int) -> None:
        entry.expert = self._layer, expert
        entry.fetch = self._loader.fetch(self._layer, expert, entry)
        self._of[entry.expert] = entry
        self._place[entry.index] = self._layer * self._eviction.scores.shape[1] + expert
        self._needed[entry.index] = True
        self._coming.append(entry)
        self._loader.load(self._layer, expert, entry.fetch)

    def _tensors(self, entry: Entry) -> Mapping[str, torch.Tensor]:
        """Of an expert that is at hand or on its way."""
        if self._failure is not None:  # whoever asks next meets the same error
            raise self._failure
        fetch, start = entry.fetch, time.perf_counter()
        fetch.ready.wait()
        self.stall_s += time.perf_counter() - start
        if fetch.error is not None:
            self._failure = fetch.error
            raise fetch.error
        if fetch.copied is not None:
            fetch.copied.wait()
        return as_compute(views(entry.buffer, self._loader.places(*entry.expert)), self._dtype)
