"""The weight stream: an iterator with look-ahead over the units that a sweep moves.

The order is known before the sweep starts and repeats with every sweep, so prefetching needs no prediction: a feeder
takes a free slot, starts the transfer of the next unit into it and goes on, across layers and across sweeps, until
no slot is free. Look-ahead is bounded by the slots' bytes. Two ways lead to a slot:

* *direct* (compute device ``cpu``): a disk unit is read straight into its compute slot; a ``cpu`` unit is copied.
* *staged* (CUDA): a disk unit is read into a pinned staging slot and copied from there on the copy stream.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flexmoe.layout import views
from flexmoe.storage import Pending
from flexmoe.weights import WeightStore, as_compute


@dataclass(slots=True)
class _Slot:
    """A fixed buffer on the compute device; ``freed`` marks the last kernel that read it."""

    buffer: torch.Tensor
    freed: object = None


@dataclass(slots=True)
class _Fetch:
    """One unit on its way: ``ready`` is set when its transfer is complete or, on CUDA, issued (then ``copied``)."""

    unit: str
    slot: _Slot | None
    ready: threading.Event = field(default_factory=threading.Event)
    copied: object = None
    tensors: dict[str, torch.Tensor] | None = None
    error: BaseException | None = None

    def done(self, error: BaseException | None = None) -> None:
        """The transfer has ended: wakes whoever waits for it."""
        self.error = error
        self.ready.set()


class WeightStream:
    """Brings units to the compute device in a fixed cyclic order.

    Args:
        store: homes of the units.
        order: the units of one sweep that are not GPU-resident, in the order of use.
        slots: how many slots to allocate; each holds the largest unit.
        staging_slots: host slots for disk units on the staged way.
        overlap: False starts a transfer only when its unit is asked for.
        staged: force the staged way (tests); default: on CUDA.

    Attributes:
        stall_s: host seconds that the consumer waited for a transfer.
    """

    def __init__(
        self,
        store: WeightStore,
        order: Sequence[str],
        slots: int,
        staging_slots: int = 0,
        *,
        overlap: bool = True,
        staged: bool | None = None,
    ):
        self._store, self._device = store, store.device
        self._order = list(order)
        self._overlap = overlap
        self._staged = store.device.is_cuda if staged is None else staged
        self.stall_s = 0.0
        self._failure: BaseException | None = None
        self._stream = self._device.stream()
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        self._free_staging: queue.SimpleQueue = queue.SimpleQueue()
        self._issued: queue.SimpleQueue = queue.SimpleQueue()
        self._to_copy: queue.SimpleQueue = queue.SimpleQueue()
        self._held: dict[str, _Fetch] = {}
        self._threads: list[threading.Thread] = []
        self._idle_slots: list[_Slot] = []
        self._idle_staging: list[tuple] = []  # (buffer, event of the last copy out of it)
        if self._order:
            self._allocate(slots, staging_slots)
            self._start()

    def get(self, unit: str) -> dict[str, torch.Tensor]:
        """Tensors of ``unit`` in the compute dtype; waits for its transfer. Streamed units must be asked for in order.

        Raises:
            StorageError, DataError: the transfer failed.
        """
        if self._store.tier_of[unit] == "gpu":
            return self._store.resident(unit)
        if unit not in self._held:
            self._held[unit] = self._take(unit)
        return self._held[unit].tensors

    def release(self, unit: str) -> None:
        """The last kernel that reads ``unit`` has been issued: its slot may be filled again once that has run."""
        fetch = self._held.pop(unit, None)
        if fetch is None:
            return
        fetch.slot.freed = self._device.record()
        if self._overlap:
            self._free.put(fetch.slot)
        else:
            self._idle_slots.append(fetch.slot)

    def close(self) -> None:
        """Stop after the transfers under way. The stream is of no use afterwards."""
        for q in (self._free, self._free_staging, self._to_copy):
            q.put(None)
        for thread in self._threads:
            thread.join()
        if self._stream is not None:
            self._stream.synchronize()  # slots and homes are freed after this

    def _needs_staging(self, unit: str) -> bool:
        return self._staged and (self._store.tier_of[unit] == "disk" or not self._store.pinned)

    def _allocate(self, slots: int, staging_slots: int) -> None:
        layouts = [self._store.layouts[u] for u in self._order]
        size = max(x.device_bytes if self._staged else max(x.host_bytes, x.device_bytes) for x in layouts)
        if self._device.is_cuda:
            arena = torch.empty(slots * size, dtype=torch.uint8, device=self._device.torch)
        else:
            size = -(-size // 4096) * 4096
            arena = self._device.host_buffer(slots * size, pinned=False)
        now = self._device.record()  # the arena's memory may have been somebody else's until here
        self._idle_slots = [_Slot(arena[i * size : (i + 1) * size], now) for i in range(slots)]
        staged = [self._store.layouts[u].host_bytes for u in self._order if self._needs_staging(u)]
        if staged:
            size = max(staged)
            arena = self._device.host_buffer(max(1, staging_slots) * size)
            self._idle_staging = [(arena[i * size : (i + 1) * size], None) for i in range(max(1, staging_slots))]
        if self._overlap:
            self._offer(len(self._idle_slots), len(self._idle_staging))

    def _offer(self, slots: int, staging: int) -> None:
        """Let the feeder have so many of the idle slots."""
        for _ in range(min(slots, len(self._idle_slots))):
            self._free.put(self._idle_slots.pop())
        for _ in range(min(staging, len(self._idle_staging))):
            self._free_staging.put(self._idle_staging.pop())

    def _take(self, unit: str) -> _Fetch:
        if self._failure is not None:  # whoever asks next meets the same error instead of waiting for ever
            raise self._failure
        if not self._overlap:
            self._offer(1, 1 if self._needs_staging(unit) else 0)
        start = time.perf_counter()
        fetch = self._issued.get()
        if fetch.error is None:
            fetch.ready.wait()
        self.stall_s += time.perf_counter() - start
        if fetch.error is not None:
            self._failure = fetch.error
            raise fetch.error
        if fetch.unit != unit:
            raise RuntimeError(f"the weight stream is at {fetch.unit}, but {unit} was asked for: wrong order")
        if fetch.copied is not None:
            fetch.copied.wait()
        layout = self._store.layouts[unit]
        places = layout.host if self._direct_read(unit) else layout.device
        fetch.tensors = as_compute(views(fetch.slot.buffer, places), self._store.dtype)
        return fetch

    def _direct_read(self, unit: str) -> bool:
        return not self._staged and self._store.tier_of[unit] == "disk"

    def _start(self) -> None:
        loops = (self._feed_staging, self._copy_staged) if self._staged else (self._feed_direct, self._copy_direct)
        for loop in loops:
            thread = threading.Thread(target=self._guard, args=(loop,), name=loop.__name__.strip("_"), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _guard(self, loop) -> None:
        """An exception of a thread becomes the error of the next fetch, not a silent end of the stream."""
        try:
            if self._device.is_cuda:
                torch.cuda.set_device(self._device.torch)
            loop()
        except Exception as e:
            self._issued.put(_Fetch("", None, error=e))

    # The direct way.

    def _feed_direct(self) -> None:
        for unit in itertools.cycle(self._order):
            slot = self._free.get()
            if slot is None:
                return
            fetch = _Fetch(unit, slot)
            self._issued.put(fetch)
            if not self._direct_read(unit):
                self._to_copy.put(fetch)
                continue
            try:
                self._store.read(unit, slot.buffer[: self._store.layouts[unit].host_bytes], fetch.done)
            except Exception as e:  # a file that cannot be opened
                fetch.done(e)

    def _copy_direct(self) -> None:
        while (fetch := self._to_copy.get()) is not None:
            layout, home = self._store.layouts[fetch.unit], self._store.home(fetch.unit)
            with self._store.recorder.span("h2d", fetch.unit, layout.stored_bytes):
                for source, target, size in layout.copies:  # numpy: one thread, and the GIL is released
                    np.copyto(fetch.slot.buffer.numpy()[target : target + size], home.numpy()[source : source + size])
            fetch.done()

    # The staged way.

    def _feed_staging(self) -> None:
        staged = [u for u in self._order if self._needs_staging(u)]
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

    def _stage(self, unit: str, buffer: torch.Tensor) -> Pending:
        if self._store.tier_of[unit] == "disk":
            return self._store.read(unit, buffer)
        np.copyto(buffer.numpy(), self._store.home(unit).numpy())
        return Pending(0)

    def _copy_staged(self) -> None:
        for unit in itertools.cycle(self._order):
            slot = self._free.get()
            if slot is None:
                return
            fetch = _Fetch(unit, slot)
            self._issued.put(fetch)
            try:
                if not self._copy_one(fetch):
                    return
            except Exception as e:
                fetch.done(e)
                return

    def _copy_one(self, fetch: _Fetch) -> bool:
        staging = None
        if self._needs_staging(fetch.unit):
            item = self._to_copy.get()
            if item is None:
                return False
            staging, pending = item
            pending.wait()
        source = self._store.home(fetch.unit) if staging is None else staging
        layout = self._store.layouts[fetch.unit]
        if fetch.slot.freed is not None and self._stream is not None:
            self._stream.wait_event(fetch.slot.freed)
        with self._device.on(self._stream):
            with self._device.timed(self._store.recorder, "h2d", fetch.unit, layout.stored_bytes, self._stream):
                for start, target, size in layout.copies:
                    into = fetch.slot.buffer[target : target + size]
                    into.copy_(source[start : start + size], non_blocking=True)
            fetch.copied = self._device.record()
        if staging is not None:  # before `done`: the serial consumer offers it for the next unit at once
            back = (staging, fetch.copied)
            self._free_staging.put(back) if self._overlap else self._idle_staging.append(back)
        fetch.done()
        return True
