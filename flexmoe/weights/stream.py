"""The weight stream: an iterator with look-ahead over the units that a sweep moves.

The order is known before the sweep starts and repeats with every sweep, so prefetching needs no prediction: a transfer thread
takes a free slot, starts the transfer of the next unit into it and continues, across layers and across sweeps, until no slot is
free. Look-ahead is bounded by the slots' bytes. `flexmoe.weights.transfers` has the threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from flexmoe.checkpoint.unit_layout import views
from flexmoe.weights.slots import Fetch, Slot, StagingSlot, needs_staging
from flexmoe.weights.store import WeightStore, as_compute
from flexmoe.weights.transfers import DirectTransfers, StagedTransfers, TransferThreads
from policies.common.memory_units import align_up
from policies.units import UnitId


class WeightStream:
    """Brings units to the compute device in a fixed cyclic order, from `start` to `close`.

    Args:
        store: homes of the units.
        units: the units that may be streamed, those that are not GPU-resident.
        slots: how many slots to allocate; each holds the largest unit.
        staging_slots: host slots for disk units where transfers are staged.
        overlap: False starts a transfer only when its unit is requested.
        staged: force staged transfers (tests); default: on CUDA.
        room_bytes: further bytes to allocate behind the slots.

    Attributes:
        stall_s: host seconds that the consumer waited for a transfer.
        staged: whether transfers are staged.
        memory: uint8, the slots one behind the other and then the further room; empty where nothing is streamed.
        slot_bytes: of one slot.
        staging: the staging slots.
    """

    def __init__(
        self,
        store: WeightStore,
        units: Sequence[UnitId],
        slots: int,
        staging_slots: int = 0,
        *,
        overlap: bool = True,
        staged: bool | None = None,
        room_bytes: int = 0,
    ):
        self._store, self._device, self._overlap = store, store.device, overlap
        self.staged = store.device.is_cuda if staged is None else staged
        self.stall_s = 0.0
        self.slot_bytes = self._slot_bytes(units)
        self.memory = self._device.device_buffer(slots * self.slot_bytes + room_bytes if units else 0)
        self._slots = _cut(self.memory, self.slot_bytes, slots if units else 0)
        self.staging = self._staging_buffers(units, staging_slots)
        self._stream = self._device.stream()
        self._transfers: TransferThreads | None = None
        self._idle_slots: list[Slot] = []
        self._idle_staging: list[StagingSlot] = []
        self._held: dict[UnitId, Fetch] = {}
        self._failure: BaseException | None = None

    def start(self, order: Sequence[UnitId], slots: int | None = None, staging_slots: int | None = None) -> None:
        """Stream an order from its beginning; units prefetched for another order are dropped.

        Args:
            order: the units of one sweep, in the order of use.
            slots, staging_slots: use only so many, the first ones.
        """
        self.close()
        self._held.clear()
        now = self._device.record()  # kernels issued so far may still use the slots' memory
        self._idle_slots = [Slot(buffer, now) for buffer in self._slots[:slots]]
        self._idle_staging = [StagingSlot(buffer) for buffer in self.staging[:staging_slots]]
        if not order:
            return
        if self.staged:
            returned = None if self._overlap else self._idle_staging.append
            transfers: TransferThreads = StagedTransfers(self._store, order, self._stream, returned)
        else:
            transfers = DirectTransfers(self._store, order)
        transfers.start()
        self._transfers = transfers
        if self._overlap:
            self._offer(transfers, len(self._idle_slots), len(self._idle_staging))

    def get(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """Tensors of ``unit`` in the compute dtype; waits for its transfer. Streamed units must be requested in order.

        Raises:
            StorageError, DataError: the transfer failed.
        """
        if self._store.tier_of[unit] == "gpu":
            return self._store.resident(unit)
        if unit not in self._held:
            self._held[unit] = self._take(unit)
        fetch = self._held[unit]
        if not fetch.tensors:
            fetch.tensors = self._as_compute(fetch)
        return fetch.tensors

    def put_aside(self, unit: UnitId) -> None:
        """Keep the slot of ``unit``, which is used again, but no cast of its weights."""
        if unit in self._held:
            self._held[unit].tensors = {}

    def release(self, unit: UnitId) -> None:
        """The last kernel that reads ``unit`` has been issued: its slot may be filled again once that has run."""
        fetch = self._held.pop(unit, None)
        if fetch is None:
            return
        fetch.slot.freed = self._device.record()
        self._idle_slots.append(fetch.slot)
        if self._overlap and self._transfers is not None:
            self._offer(self._transfers, 1, 0)

    def close(self) -> None:
        """Stop after the transfers under way; homes and slots may be freed then."""
        if self._transfers is not None:
            self._transfers.stop()
            self._transfers = None

    def _slot_bytes(self, units: Sequence[UnitId]) -> int:
        layouts = [self._store.layouts[unit] for unit in units]
        sizes = (x.device_bytes if self.staged else max(x.host_bytes, x.device_bytes) for x in layouts)
        return align_up(max(sizes, default=0))

    def _staging_buffers(self, units: Sequence[UnitId], count: int) -> list[torch.Tensor]:
        staged = [u for u in units if self.staged and needs_staging(self._store, u)]
        if not staged:
            return []
        size = max(self._store.layouts[unit].host_bytes for unit in staged)
        count = max(1, count)
        return _cut(self._device.host_buffer(count * size), size, count)

    def _offer(self, transfers: TransferThreads, slots: int, staging: int) -> None:
        """Let the transfer threads have so many of the idle slots."""
        for _ in range(min(slots, len(self._idle_slots))):
            transfers.offer(self._idle_slots.pop())
        if isinstance(transfers, StagedTransfers):
            for _ in range(min(staging, len(self._idle_staging))):
                transfers.offer_staging(self._idle_staging.pop())

    def _take(self, unit: UnitId) -> Fetch:
        if self._failure is not None:  # the next call meets the same error instead of waiting for ever
            raise self._failure
        fetch = self._next(unit)
        if fetch.unit != unit:
            raise RuntimeError(f"the weight stream is at {fetch.unit}, but {unit} was asked for: wrong order")
        if fetch.copied is not None:
            fetch.copied.wait(self._device.compute)
        return fetch

    def _as_compute(self, fetch: Fetch) -> dict[str, torch.Tensor]:
        layout = self._store.layouts[fetch.unit]
        direct_read = not self.staged and self._store.tier_of[fetch.unit] == "disk"
        tensors = views(fetch.slot.buffer, layout.host if direct_read else layout.device)
        return as_compute(tensors, self._store.dtype)

    def _next(self, unit: UnitId) -> Fetch:
        """The next fetch of the order, when it is ready; ``unit`` is what is expected of it."""
        if self._transfers is None:
            raise RuntimeError(f"the weight stream does not run, but {unit} was asked for")
        if not self._overlap:
            self._offer(self._transfers, 1, 1 if needs_staging(self._store, unit) else 0)
        start = time.perf_counter()
        fetch = self._transfers.issued.get()
        if not isinstance(fetch, BaseException):
            fetch.ready.wait()
        self.stall_s += time.perf_counter() - start
        if isinstance(fetch, BaseException):
            self._failure = fetch
            raise fetch
        if fetch.error is not None:
            self._failure = fetch.error
            raise fetch.error
        return fetch


def _cut(memory: torch.Tensor, size: int, count: int) -> list[torch.Tensor]:
    """So many pieces of a size, from the beginning."""
    return [memory[at * size : (at + 1) * size] for at in range(count)]
