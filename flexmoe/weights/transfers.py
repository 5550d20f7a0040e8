"""Threads that fill free slots with the units of an order, one after the other and round again.

* *direct* (compute device ``cpu``): a disk unit is read straight into its compute slot; a ``cpu`` unit is copied.
* *staged* (CUDA): a disk unit is read into a pinned staging slot and copied from there on the copy stream.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flexmoe.system.direct_io import Pending
from flexmoe.weights.store import WeightStore
from policies.units import UnitId


@dataclass(slots=True, eq=False)
class Slot:
    """A fixed buffer on the compute device; ``freed`` marks the last kernel that read it."""

    buffer: torch.Tensor
    freed: object = None


@dataclass(slots=True, eq=False)
class Fetch:
    """One unit on its way: ``ready`` is set when its transfer is complete or, on CUDA, issued (then ``copied``);
    ``seconds`` are those until then."""

    unit: UnitId | None
    slot: Slot | None
    ready: threading.Event = field(default_factory=threading.Event)
    copied: object = None
    tensors: dict[str, torch.Tensor] | None = None
    error: BaseException | None = None
    seconds: float = 0.0
    _start_s: float = field(default_factory=time.perf_counter)

    def done(self, error: BaseException | None = None) -> None:
        """The transfer has ended: wakes whoever waits for it."""
        self.error, self.seconds = error, time.perf_counter() - self._start_s
        self.ready.set()


def needs_staging(store: WeightStore, unit: UnitId) -> bool:
    """Whether a unit passes through a staging slot on the staged way."""
    return store.tier_of[unit] == "disk" or not store.pinned


class Feeder(ABC):
    """Fills what it is offered, in order.

    Args:
        store: homes of the units.
        order: the units.

    Attributes:
        issued: the fetches in order, each put there when its slot is taken; an exception of a thread comes as one too.
    """

    def __init__(self, store: WeightStore, order: Sequence[UnitId]):
        self._store, self._device, self._order = store, store.device, list(order)
        self.issued: queue.SimpleQueue[Fetch] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._to_copy: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=loop.__name__.strip("_"), daemon=True)
            for loop in self._loops()
        ]
        for thread in self._threads:
            thread.start()

    def offer(self, slot: Slot) -> None:
        """A slot that may be filled."""
        self._free.put(slot)

    @abstractmethod
    def stop(self) -> None:
        """End the threads; when it returns, nothing is written to a slot or a staging slot any more."""

    @abstractmethod
    def _loops(self) -> Sequence[Callable[[], None]]: ...

    def _fetches(self) -> Iterator[Fetch]:
        """Fetches of the units in order, each when there is a slot for it, until the feeder is stopped."""
        for unit in itertools.cycle(self._order):
            slot = self._free.get()
            if slot is None:
                return
            fetch = Fetch(unit, slot)
            self.issued.put(fetch)
            yield fetch

    def _end(self, *offered: queue.SimpleQueue) -> None:
        """Start nothing more with what has been offered, finish what has been started, and end."""
        for q in offered:
            _drained(q)
            q.put(None)
        feeding, copying = self._threads
        feeding.join()
        self._to_copy.put(None)  # behind all that the other has put there
        copying.join()

    def _guard(self, loop: Callable[[], None]) -> None:
        """An exception of a thread becomes the error of the next fetch, not a silent end of the stream."""
        try:
            if self._device.is_cuda:
                torch.cuda.set_device(self._device.torch)
            loop()
        except Exception as e:
            self.issued.put(Fetch(None, None, error=e))


class DirectFeeder(Feeder):
    """Disk units are read into their slots, ``cpu`` units copied."""

    def stop(self) -> None:
        """End the threads, and wait for the transfers under way."""
        self._end(self._free)
        for fetch in _drained(self.issued):
            if fetch.slot is not None:
                fetch.ready.wait()

    def _loops(self) -> Sequence[Callable[[], None]]:
        return self._feed_direct, self._copy_direct

    def _feed_direct(self) -> None:
        for fetch in self._fetches():
            if self._store.tier_of[fetch.unit] != "disk":
                self._to_copy.put(fetch)
                continue
            size = self._store.layouts[fetch.unit].host_bytes
            try:
                self._store.read(fetch.unit, fetch.slot.buffer[:size], fetch.done)
            except Exception as e:  # a file that cannot be opened
                fetch.done(e)

    def _copy_direct(self) -> None:
        while (fetch := self._to_copy.get()) is not None:
            layout, home = self._store.layouts[fetch.unit], self._store.home(fetch.unit)
            with self._store.recorder.span("h2d", str(fetch.unit), layout.stored_bytes):
                copy_bytes(layout.copies, home, fetch.slot.buffer)
            fetch.done()


class StagedFeeder(Feeder):
    """Everything is copied on ``stream``: from its home, or from a staging slot that it was read into.

    Args:
        staging: staging slots, offered as `offer_staging` has it.
        stream: the copy stream; None on a device without.
        returned: called with every staging slot whose copy has been issued.
    """

    def __init__(self, store: WeightStore, order: Sequence[UnitId], stream, returned: Callable[[tuple], None]):
        self._stream, self._returned = stream, returned
        self._free_staging: queue.SimpleQueue = queue.SimpleQueue()
        super().__init__(store, order)

    def offer_staging(self, staging: tuple) -> None:
        """A (buffer, event of the last copy out of it) that may be read into."""
        self._free_staging.put(staging)

    def stop(self) -> None:
        """End the threads, and wait for the reads and copies under way."""
        self._end(self._free, self._free_staging)
        for item in _drained(self._to_copy):
            if item is not None:
                with contextlib.suppress(Exception):  # nobody waits for these bytes any more
                    item[1].wait()
        if self._stream is not None:
            self._stream.synchronize()

    def _loops(self) -> Sequence[Callable[[], None]]:
        return self._feed_staging, self._copy_staged

    def _feed_staging(self) -> None:
        staged = [u for u in self._order if needs_staging(self._store, u)]
        for unit in itertools.cycle(staged) if staged else ():
            item = self._free_staging.get()
            if item is None:
                return
            buffer, copied = item
            try:
                if copied is not None:
                    copied.synchronize()
                pending = self._stage(unit, buffer[: self._store.layouts[unit].host_bytes])
            except Exception as e:  # the copy that waits for this buffer meets it
                pending = Pending(1)
                pending.piece_done(e)
            self._to_copy.put((buffer, pending))

    def _stage(self, unit: UnitId, buffer: torch.Tensor) -> Pending:
        if self._store.tier_of[unit] == "disk":
            return self._store.read(unit, buffer)
        np.copyto(buffer.numpy(), self._store.home(unit).numpy())
        return Pending(0)

    def _copy_staged(self) -> None:
        for fetch in self._fetches():
            try:
                if not self._copy_one(fetch):
                    return
            except Exception as e:
                fetch.done(e)
                return

    def _copy_one(self, fetch: Fetch) -> bool:
        staging = None
        if needs_staging(self._store, fetch.unit):
            item = self._to_copy.get()
            if item is None:
                return False
            staging, pending = item
            pending.wait()
        source = self._store.home(fetch.unit) if staging is None else staging
        layout = self._store.layouts[fetch.unit]
        copy = str(fetch.unit), layout.copies, layout.stored_bytes
        fetch.copied = copy_to_device(self._store, self._stream, source, fetch.slot, *copy)
        if staging is not None:  # before `done`: the serial consumer offers it for the next unit at once
            self._returned((staging, fetch.copied))
        fetch.done()
        return True


def _drained(q: queue.SimpleQueue) -> list:
    """All that a queue holds, taken out of it."""
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(q.get_nowait())
    return items


def copy_bytes(copies: Sequence[tuple[int, int, int]], source: torch.Tensor, target: torch.Tensor) -> None:
    """The stretches (from, to, bytes) on the host. By numpy: one thread, and the GIL is released."""
    for start, into, size in copies:
        np.copyto(target.numpy()[into : into + size], source.numpy()[start : start + size])


def copy_to_device(
    store: WeightStore,
    stream,
    source: torch.Tensor,
    slot: Slot,
    name: str,
    copies: Sequence,
    nbytes: int,
    lane: str = "h2d",
) -> object:
    """Issue the copy of the stretches from host bytes to a slot on ``stream``, after the slot's last user.

    Args:
        lane: where the copy is recorded.

    Returns:
        The event of the copy.
    """
    device = store.device
    if slot.freed is not None and stream is not None:
        stream.wait_event(slot.freed)
    with device.on(stream), device.timed(store.recorder, lane, name, nbytes, stream):
        for start, into, size in copies:
            slot.buffer[into : into + size].copy_(source[start : start + size], non_blocking=True)
    return device.record(stream)
