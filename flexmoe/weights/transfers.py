"""Transfer threads that fill slots with the units of an order, one after the other and round again.

* *direct* (compute device ``cpu``): a disk unit is read straight into its compute slot; a ``cpu`` unit is copied.
* *staged* (CUDA): a disk unit is read into a pinned staging slot and copied from there on the copy stream.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from flexmoe.system.device import Stream
from flexmoe.system.direct_io import Pending
from flexmoe.system.machine import yield_to_others
from flexmoe.weights.slots import Fetch, Slot, StagingSlot, copy_bytes, copy_to_device, needs_staging
from flexmoe.weights.store import WeightStore
from policies.units import UnitId

_Item = TypeVar("_Item")
#: Of the thread that copies on a core which also computes. A thread of a GEMM that finds its core taken holds up all the others;
#: this way it gets the core at once. Lower still costs too much where other processes keep the cores busy.
_COPY_NICENESS = 10


class TransferThreads(ABC):
    """Two threads that fill the slots they are offered, in order, from `start` to `stop`.

    Args:
        store: homes of the units.
        order: the units.

    Attributes:
        issued: the fetches in order, each put there when its slot is taken; an exception that ended a thread is put there itself.
    """

    def __init__(self, store: WeightStore, order: Sequence[UnitId]):
        self._store, self._device, self._order = store, store.device, list(order)
        self.issued: queue.SimpleQueue[Fetch | BaseException] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads; when one of them cannot be started, none is left running."""
        try:
            for loop in self._loops():
                thread = threading.Thread(target=self._guard, args=(loop,), name=loop.__name__.strip("_"), daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.stop()
            raise

    def offer(self, slot: Slot) -> None:
        """A slot that may be filled."""
        self._free.put(slot)

    @abstractmethod
    def stop(self) -> None:
        """End the threads; when it returns, nothing is written to a slot or a staging slot any more."""

    @abstractmethod
    def _loops(self) -> Sequence[Callable[[], None]]:
        """What the two threads do; the first hands its work on to the second."""

    def _fetches(self) -> Iterator[Fetch]:
        """Fetches of the units in order, each when there is a slot for it, until the threads are stopped."""
        for unit in itertools.cycle(self._order):
            slot = self._free.get()
            if slot is None:
                return
            fetch = Fetch(unit, slot)
            self.issued.put(fetch)
            yield fetch

    def _end(self, end_first: Callable[[], None], end_second: Callable[[], None]) -> None:
        """End the threads, the second behind all that the first has handed on to it."""
        end_first()
        for thread in self._threads[:1]:
            thread.join()
        end_second()
        for thread in self._threads[1:]:
            thread.join()
        self._threads.clear()

    def _guard(self, loop: Callable[[], None]) -> None:
        """An exception of a thread becomes the error of the next fetch, not a silent end of the stream."""
        try:
            loop()
        except Exception as e:
            self.issued.put(e)


class DirectTransfers(TransferThreads):
    """Disk units are read into their slots, ``cpu`` units copied."""

    def __init__(self, store: WeightStore, order: Sequence[UnitId]):
        super().__init__(store, order)
        self._to_copy: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()

    def stop(self) -> None:
        """End the threads, and wait for the transfers under way."""
        self._end(lambda: _close(self._free), lambda: self._to_copy.put(None))
        for fetch in _drained(self.issued):
            if not isinstance(fetch, BaseException):
                fetch.ready.wait()

    def _loops(self) -> Sequence[Callable[[], None]]:
        return self._read_into_slots, self._copy_into_slots

    def _read_into_slots(self) -> None:
        for fetch in self._fetches():
            if self._store.tier_of[fetch.unit] != "disk":
                self._to_copy.put(fetch)
                continue
            size = self._store.layouts[fetch.unit].host_bytes
            try:
                self._store.read(fetch.unit, fetch.slot.buffer[:size], fetch.done)
            except Exception as e:  # a file that cannot be opened
                fetch.done(e)

    def _copy_into_slots(self) -> None:
        yield_to_others(_COPY_NICENESS)
        while (fetch := self._to_copy.get()) is not None:
            layout, home = self._store.layouts[fetch.unit], self._store.home(fetch.unit)
            with self._store.recorder.span("h2d", str(fetch.unit), layout.stored_bytes):
                copy_bytes(layout.copies, home, fetch.slot.buffer)
            fetch.done()


class StagedTransfers(TransferThreads):
    """Everything is copied on ``stream``: from its home, or from a staging slot that it was read into.

    Args:
        stream: the copy stream; None on a device without.
        returned: called with every staging slot whose copy has been issued; None: it is read into again at once.
    """

    def __init__(
        self,
        store: WeightStore,
        order: Sequence[UnitId],
        stream: Stream | None,
        returned: Callable[[StagingSlot], None] | None = None,
    ):
        super().__init__(store, order)
        self._stream, self._returned = stream, returned or self.offer_staging
        self._free_staging: queue.SimpleQueue[StagingSlot | None] = queue.SimpleQueue()
        self._to_copy: queue.SimpleQueue[tuple[StagingSlot, Pending] | None] = queue.SimpleQueue()

    def offer_staging(self, staging: StagingSlot) -> None:
        """A staging slot that may be read into once its last copy is done."""
        self._free_staging.put(staging)

    def stop(self) -> None:
        """End the threads, and wait for the reads and copies under way."""
        self._end(self._take_nothing_more, lambda: self._to_copy.put(None))
        for item in _drained(self._to_copy):
            if item is not None:
                with contextlib.suppress(Exception):  # these bytes are not used any more
                    item[1].wait()
        if self._stream is not None:
            self._stream.synchronize()

    def _take_nothing_more(self) -> None:
        _close(self._free)
        _close(self._free_staging)

    def _loops(self) -> Sequence[Callable[[], None]]:
        return self._read_into_staging, self._copy_into_slots

    def _read_into_staging(self) -> None:
        staged = [unit for unit in self._order if needs_staging(self._store, unit)]
        for unit in itertools.cycle(staged) if staged else ():
            staging = self._free_staging.get()
            if staging is None:
                return
            try:
                staging.wait()
                pending = self._stage(unit, staging.buffer[: self._store.layouts[unit].host_bytes])
            except Exception as e:  # the copy that waits for this buffer meets it
                pending = Pending(1)
                pending.piece_done(e)
            self._to_copy.put((staging, pending))

    def _stage(self, unit: UnitId, buffer: torch.Tensor) -> Pending:
        if self._store.tier_of[unit] == "disk":
            return self._store.read(unit, buffer)
        np.copyto(buffer.numpy(), self._store.home(unit).numpy())
        return Pending(0)

    def _copy_into_slots(self) -> None:
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
        source = self._store.home(fetch.unit) if staging is None else staging.buffer
        layout = self._store.layouts[fetch.unit]
        name, copies, nbytes = str(fetch.unit), layout.copies, layout.stored_bytes
        fetch.copied = copy_to_device(self._store, self._stream, source, fetch.slot, name, copies, nbytes)
        if staging is not None:  # before `done`: the serial consumer offers it for the next unit at once
            self._returned(StagingSlot(staging.buffer, fetch.copied))
        fetch.done()
        return True


def _close(offered: queue.SimpleQueue[_Item | None]) -> None:
    """Empty a queue of offers and end the thread that reads it."""
    _drained(offered)
    offered.put(None)


def _drained(q: queue.SimpleQueue[_Item]) -> list[_Item]:
    """All that a queue holds, taken out of it."""
    items = []
    with contextlib.suppress(queue.Empty):
        while True:
            items.append(q.get_nowait())
    return items
