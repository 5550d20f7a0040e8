"""Loads single experts into given buffers, each as soon as it is requested.

Transfers are direct or staged, as those of the weight stream: on device ``cpu`` an expert is read from disk straight into its
buffer, or copied; on CUDA it is read into a pinned staging slot and copied on a stream of its own, beside the stream's copies.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from flexmoe.checkpoint.unit_layout import Place, UnitLayout, expert_copies
from flexmoe.system.device import Event
from flexmoe.weights.slots import Copies, Fetch, Slot, StagingSlot, copy_bytes, copy_to_device
from flexmoe.weights.store import WeightStore
from policies.units import UnitId

#: Staged loads that are under way at once.
_MOST_AT_ONCE = 8
#: A lane works in order, and these copies run beside those of the weight stream.
_LANE = "h2d/experts"


class ExpertLoader:
    """Loads experts whose home is in host memory or on disk.

    Args:
        store: homes of the units.
        units: the units of experts that do not live on the device.
        staged: whether transfers are staged.
        staging: pinned buffers for that, used from a load to the next `settle`.
    """

    def __init__(self, store: WeightStore, units: Iterable[UnitId], staged: bool, staging: Sequence[torch.Tensor]):
        self._store, self._device, self._staged = store, store.device, staged
        self._unit_of: dict[tuple[int, int], tuple[UnitId, int]] = {}
        for unit in units:
            self._unit_of |= {(unit.layer, e): (unit, place) for place, e in enumerate(unit.experts)}
        self._stream = self._device.stream() if staged else None
        self._staging: queue.SimpleQueue[StagingSlot] = queue.SimpleQueue()
        self._issues = threading.Lock()
        for buffer in staging:
            self._staging.put(StagingSlot(buffer))
        self._threads = ThreadPoolExecutor(max(1, min(len(staging), _MOST_AT_ONCE)), "expert loads")

    def places(self, layer: int, expert: int) -> Mapping[str, Place]:
        """Where the tensors of a loaded expert lie in its buffer."""
        layout = self._store.expert_layout(UnitId("expert", layer, expert))
        return layout.host if self._is_read(self._unit_of[layer, expert][0]) else layout.device

    def load(self, layer: int, expert: int, fetch: Fetch) -> None:
        """Start to fill ``fetch.slot``; `Fetch.done` tells when, or what went wrong."""
        unit, place = self._unit_of[layer, expert]
        layout = self._store.expert_layout(fetch.unit)
        if not self._is_read(unit):
            self._threads.submit(self._bring, unit, place, layout, fetch)
            return
        try:
            self._store.read_expert(fetch.unit, fetch.slot.buffer[: layout.host_bytes], fetch.done)
        except Exception as e:  # a file that cannot be opened
            fetch.done(e)

    def fetch(self, layer: int, expert: int, slot: Slot) -> Fetch:
        """A fetch of an expert that has not been started."""
        return Fetch(UnitId("expert", layer, expert), slot)

    def settle(self) -> None:
        """Wait for the copies of all loads that are done; the staging buffers are then free for others until the next load."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Finish what is under way; buffers and homes may be freed afterwards."""
        self._threads.shutdown()
        self.settle()

    def _is_read(self, unit: UnitId) -> bool:
        """Whether experts of a unit are read from disk straight into their buffers."""
        return not self._staged and self._store.tier_of[unit] == "disk"

    def _bring(self, unit: UnitId, place: int, layout: UnitLayout, fetch: Fetch) -> None:
        try:
            (self._upload if self._staged else self._copy)(unit, place, layout, fetch)
        except BaseException as e:
            fetch.done(e)
            return
        fetch.done()

    def _copy(self, unit: UnitId, place: int, layout: UnitLayout, fetch: Fetch) -> None:
        copies = expert_copies(self._store.layouts[unit], place, layout.device)
        with self._store.recorder.span(_LANE, str(fetch.unit), layout.stored_bytes):
            copy_bytes(copies, self._store.home(unit), fetch.slot.buffer)

    def _upload(self, unit: UnitId, place: int, layout: UnitLayout, fetch: Fetch) -> None:
        store = self._store

        def upload(source: torch.Tensor, copies: Copies) -> Event:
            name, nbytes = str(fetch.unit), layout.stored_bytes
            with self._issues:
                return copy_to_device(store, self._stream, source, fetch.slot, name, copies, nbytes, _LANE)

        if store.tier_of[unit] == "disk":
            with self._staging_buffer() as buffer:
                store.read_expert(fetch.unit, buffer[: layout.host_bytes]).wait()
                fetch.copied = upload(buffer, layout.copies)
            return
        copies = expert_copies(store.layouts[unit], place, layout.device)
        if store.pinned:
            fetch.copied = upload(store.home(unit), copies)
            return
        with self._staging_buffer() as buffer:
            copy_bytes(copies, store.home(unit), buffer)
            fetch.copied = upload(buffer, [(0, 0, layout.device_bytes)])

    @contextlib.contextmanager
    def _staging_buffer(self) -> Iterator[torch.Tensor]:
        """A pinned buffer for what is copied in the body."""
        staging = self._staging.get()
        try:
            staging.wait()
            yield staging.buffer
        finally:
            self._staging.put(StagingSlot(staging.buffer, self._device.record(self._stream)))
