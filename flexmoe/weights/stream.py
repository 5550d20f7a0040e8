"""The weight stream: an iterator with look-ahead over the units that a sweep moves.

The order is known before the sweep starts and repeats with every sweep, so prefetching needs no prediction: a feeder
takes a free slot, starts the transfer of the next unit into it and goes on, across layers and across sweeps, until
no slot is free. Look-ahead is bounded by the slots' bytes. `flexmoe.weights.transfers` has the ways that lead to a slot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from flexmoe.checkpoint.unit_layout import views
from flexmoe.weights.store import WeightStore, as_compute
from flexmoe.weights.transfers import DirectFeeder, Feeder, Fetch, Slot, StagedFeeder, needs_staging
from policies.common.memory_units import SYSTEM_PAGE_BYTES
from policies.units import UnitId


class WeightStream:
    """Brings units to the compute device in a fixed cyclic order.

    Args:
        store: homes of the units.
        order: the units of one sweep that are not GPU-resident, in the order of use.
        slots: how many slots to allocate; each holds the largest unit.
        staging_slots: host slots for disk units on the staged way.
        overlap: False starts a transfer only when its unit is asked for.
        staged: force the staged way (tests); default: on CUDA.
        room_bytes: further bytes to allocate behind the slots.

    Attributes:
        stall_s: host seconds that the consumer waited for a transfer.
        staged: as above.
        memory: uint8, the slots one behind the other and then the further room; None where nothing is streamed.
        slot_bytes: of one slot.
        staging: the staging slots.
    """

    def __init__(
        self,
        store: WeightStore,
        order: Sequence[UnitId],
        slots: int,
        staging_slots: int = 0,
        *,
        overlap: bool = True,
        staged: bool | None = None,
        room_bytes: int = 0,
    ):
        self._store, self._device = store, store.device
        self._overlap = overlap
        self.staged = store.device.is_cuda if staged is None else staged
        self.stall_s, self.slot_bytes = 0.0, 0
        self.memory: torch.Tensor | None = None
        self._failure: BaseException | None = None
        self._stream = self._device.stream()
        self._held: dict[UnitId, Fetch] = {}
        self._feeder: Feeder | None = None
        self._slots: list[torch.Tensor] = []
        self.staging: list[torch.Tensor] = []
        if order:
            self._allocate(order, slots, staging_slots, room_bytes)
            self.restart(order)

    def get(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """Tensors of ``unit`` in the compute dtype; waits for its transfer. Streamed units must be asked for in order.

        Raises:
            StorageError, DataError: the transfer failed.
        """
        if self._store.tier_of[unit] == "gpu":
            return self._store.resident(unit)
        if unit not in self._held:
            self._held[unit] = self._take(unit)
        return self._held[unit].tensors

    def release(self, unit: UnitId) -> None:
        """The last kernel that reads ``unit`` has been issued: its slot may be filled again once that has run."""
        fetch = self._held.pop(unit, None)
        if fetch is None:
            return
        fetch.slot.freed = self._device.record()
        if self._overlap:
            self._feeder.offer(fetch.slot)
        else:
            self._idle_slots.append(fetch.slot)

    def restart(self, order: Sequence[UnitId], slots: int | None = None, staging_slots: int | None = None) -> None:
        """Go on with another order, from its beginning; what has been brought ahead is dropped.

        Args:
            slots, staging_slots: use only so many, the first ones.
        """
        if self._feeder is not None:
            self._feeder.stop()
            self._feeder = None
        self._held.clear()
        now = self._device.record()  # the slots' memory may have been somebody else's until here
        self._idle_slots = [Slot(buffer, now) for buffer in self._slots[:slots]]
        self._idle_staging = [(buffer, None) for buffer in self.staging[:staging_slots]]
        if not order:
            return
        if not self.staged:
            self._feeder = DirectFeeder(self._store, order)
        else:
            self._feeder = StagedFeeder(self._store, order, self._stream, self._staging_returned)
        if self._overlap:
            self._offer(len(self._idle_slots), len(self._idle_staging))

    def close(self) -> None:
        """Stop after the transfers under way. The stream is of no use afterwards."""
        if self._feeder is not None:
            self._feeder.stop()  # slots and homes are freed after this
            self._feeder = None

    def _allocate(self, order: Sequence[UnitId], slots: int, staging_slots: int, room_bytes: int) -> None:
        layouts = [self._store.layouts[u] for u in order]
        size = max(x.device_bytes if self.staged else max(x.host_bytes, x.device_bytes) for x in layouts)
        size = -(-size // SYSTEM_PAGE_BYTES) * SYSTEM_PAGE_BYTES
        self.memory = self._device.device_buffer(slots * size + room_bytes)
        self.slot_bytes = size
        self._slots = [self.memory[i * size : (i + 1) * size] for i in range(slots)]
        staged = [self._store.layouts[u].host_bytes for u in order if self.staged and needs_staging(self._store, u)]
        if staged:
            size, count = max(staged), max(1, staging_slots)
            arena = self._device.host_buffer(count * size)
            self.staging = [arena[i * size : (i + 1) * size] for i in range(count)]

    def _offer(self, slots: int, staging: int) -> None:
        """Let the feeder have so many of the idle slots."""
        for _ in range(min(slots, len(self._idle_slots))):
            self._feeder.offer(self._idle_slots.pop())
        for _ in range(min(staging, len(self._idle_staging))):
            self._feeder.offer_staging(self._idle_staging.pop())

    def _staging_returned(self, staging: tuple) -> None:
        if self._overlap:
            self._feeder.offer_staging(staging)
        else:
            self._idle_staging.append(staging)

    def _take(self, unit: UnitId) -> Fetch:
        if self._failure is not None:  # whoever asks next meets the same error instead of waiting for ever
            raise self._failure
        if not self._overlap:
            self._offer(1, 1 if self.staged and needs_staging(self._store, unit) else 0)
        start = time.perf_counter()
        fetch = self._feeder.issued.get()
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
        direct_read = not self.staged and self._store.tier_of[unit] == "disk"
        fetch.tensors = as_compute(
            views(fetch.slot.buffer, layout.host if direct_read else layout.device), self._store.dtype
        )
        return fetch
