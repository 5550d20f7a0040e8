"""Homes of the weight units, and the stream that brings them to the compute device in schedule order.

A home is written once, at load, and never again. What lives on the GPU has no host copy; what lives on disk is read
straight from the checkpoint's shards, each sweep anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch

from cost_model.memory.memory_plan import LOADS_IN_FLIGHT
from flexmoe.checkpoint.unit_layout import FLOAT32_ROLES, UnitLayout, pack, views
from flexmoe.formats.packed_matrix import is_packed
from flexmoe.system.device import Device
from flexmoe.system.direct_io import PIECE_BYTES, DiskPool, OnDone, Pending
from flexmoe.system.trace import Recorder
from flexmoe.weights.sources import WeightSource
from policies.units import UnitId


def _keeps_dtype(role: str) -> bool:
    """Whether a tensor is used in the dtype that it has at rest: a field of a packed matrix, or what is always float32."""
    return is_packed(role) or role in FLOAT32_ROLES


def as_compute(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a unit in the compute dtype: the one place where stored weights are cast. Some keep theirs."""
    return {role: t if t.dtype == dtype or _keeps_dtype(role) else t.to(dtype) for role, t in tensors.items()}


class WeightStore:
    """Where every unit lives: device tensors for ``gpu``, host bytes for ``cpu``, the source's files for ``disk``.

    It is filled by `load`, once, before anything is asked of it.

    Args:
        device: the compute device.
        recorder: where loads are counted.
        source: a checkpoint, or random numbers.
        tier_of: tier of each unit.
        dtype: compute dtype; GPU homes hold it.
        pin: keep CPU homes registered with the driver.
        piece_bytes: of reads from disk, as in `DiskPool`.
    """

    def __init__(
        self,
        device: Device,
        recorder: Recorder,
        source: WeightSource,
        tier_of: Mapping[UnitId, str],
        dtype: torch.dtype,
        pin: bool = True,
        piece_bytes: int = PIECE_BYTES,
    ):
        self.device = device
        self.dtype = dtype
        self.tier_of = dict(tier_of)
        self.pinned = pin
        self.recorder = recorder
        self.layouts: dict[UnitId, UnitLayout] = {unit: source.layout(unit) for unit in tier_of}
        self._source = source
        self._pool = DiskPool(recorder, piece_bytes=piece_bytes)
        self._urgent = self._pool.urgent()
        self._cpu: dict[UnitId, torch.Tensor] = {}
        self._gpu: dict[UnitId, dict[str, torch.Tensor]] = {}

    def load(self) -> None:
        """Bring every unit to its home.

        Raises:
            StorageError, DataError: a unit cannot be read, or disk units not be written.
            InfeasibleError: the host has not that much memory.
        """
        self._source.prepare(self._of_tier("disk"))
        reading = self._begin_cpu(self._of_tier("cpu"))
        try:
            self._load_gpu(self._of_tier("gpu"))
        finally:  # nothing may be written into buffers that are given up
            for each in reading:
                each.wait()

    def read(self, unit: UnitId, buffer: torch.Tensor, on_done: OnDone | None = None) -> Pending:
        """Start reading a unit's stored bytes into ``buffer`` (uint8, page-aligned, ``layout.host_bytes``)."""
        return self._source.read(unit, buffer, self._pool, on_done)

    def read_expert(self, expert: UnitId, buffer: torch.Tensor, on_done: OnDone | None = None) -> Pending:
        """Start reading a single expert, before all reads queued by `read`; its layout is `expert_layout`."""
        return self._source.read(expert, buffer, self._urgent, on_done)

    def expert_layout(self, expert: UnitId) -> UnitLayout:
        """Layout of a single expert by itself, whatever unit it belongs to."""
        return self._source.layout(expert)

    def home(self, unit: UnitId) -> torch.Tensor:
        """Host bytes of a ``cpu`` unit, in its host layout."""
        return self._cpu[unit]

    def resident(self, unit: UnitId) -> dict[str, torch.Tensor]:
        """Device tensors of a ``gpu`` unit, in the compute dtype."""
        return self._gpu[unit]

    def close(self) -> None:
        """Stop the disk threads."""
        self._pool.close()

    def _of_tier(self, tier: str) -> list[UnitId]:
        return [unit for unit, t in self.tier_of.items() if t == tier]

    def _begin_cpu(self, units: list[UnitId]) -> list[Pending]:
        """Starts reading the units of host memory; those of the device are read before what is still waiting."""
        arena = self.device.host_buffer(sum(self.layouts[u].host_bytes for u in units), pinned=self.pinned)
        offset, pending = 0, []
        for unit in units:
            size = self.layouts[unit].host_bytes
            self._cpu[unit] = arena[offset : offset + size]
            pending.append(self.read(unit, self._cpu[unit]))
            offset += size
        return pending

    def _load_gpu(self, units: list[UnitId]) -> None:
        if not units:
            return
        placed = {u: pack(self._computed(u)) for u in units}
        arena = self.device.device_buffer(sum(size for _, size in placed.values()))
        offset = 0
        for unit, (places, size) in placed.items():
            self._gpu[unit] = views(arena[offset : offset + size], places)
            offset += size
        largest = max(self.layouts[u].host_bytes for u in units)
        staging = deque(self.device.host_buffer(largest, pinned=False) for _ in range(min(LOADS_IN_FLIGHT, len(units))))
        reading: deque[tuple[UnitId, torch.Tensor, Pending]] = deque()
        for unit in units:
            if not staging:
                staging.append(self._upload(*reading.popleft()))
            buffer = staging.popleft()
            stored = buffer[: self.layouts[unit].host_bytes]
            reading.append((unit, buffer, self._source.read(unit, stored, self._urgent)))
        while reading:
            self._upload(*reading.popleft())

    def _computed(self, unit: UnitId) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of a unit's tensors on the device."""
        places = self.layouts[unit].device.items()
        return {role: (place.dtype if _keeps_dtype(role) else self.dtype, place.shape) for role, place in places}

    def _upload(self, unit: UnitId, buffer: torch.Tensor, pending: Pending) -> torch.Tensor:
        pending.wait()
        for piece in self.layouts[unit].pieces:
            (tensor,) = views(buffer, {piece.role: piece.place}).values()
            into = self._gpu[unit][piece.role].view(-1)[piece.into : piece.into + tensor.numel()]
            into.copy_(tensor.view(-1))
        return buffer


class EmbeddingTable:
    """Token embeddings. Only the rows of the sweep's tokens move, whatever the table's home.

    Args:
        store: the weight store.
        source: the weight source, for a table on disk.
        unit: the embedding; it has the one part ``embed`` of shape ``[vocab, hidden]``.
        max_tokens: most tokens of one sweep.

    Attributes:
        resident: whether the table, and with it the ids that are looked up, belong on the compute device.
    """

    def __init__(self, store: WeightStore, source: WeightSource, unit: UnitId, max_tokens: int):
        self._store, self._source, self._unit = store, source, unit
        self._tier = store.tier_of[unit]
        self.resident = self._tier == "gpu"
        place = store.layouts[unit].host["embed"]
        self._row_bytes = place.shape[1] * place.dtype.itemsize
        self._dtype, self._width = place.dtype, place.shape[1]
        if self._tier == "cpu":
            self._table = views(store.home(unit), store.layouts[unit].host)["embed"]
        if self._tier != "gpu":
            self._rows = store.device.host_buffer(max_tokens * self._row_bytes)

    def __call__(self, ids_T: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Embeddings ``[T, D]`` on the compute device of token ids ``[T]`` (int64).

        Args:
            ids_T: on the compute device if the table is `resident`, else on the host.
            first: tokens of the sweep before these. Every token of a sweep has its own place in the host buffer, because
                the copy to the device may still run after the call.
        """
        store = self._store
        if self._tier == "gpu":
            return store.resident(self._unit)["embed"].index_select(0, ids_T)
        rows = self._rows[first * self._row_bytes : (first + len(ids_T)) * self._row_bytes]
        rows = rows.view(self._dtype).view(len(ids_T), self._width)
        with store.recorder.span("h2d/embed", "embed", rows.numel() * rows.element_size()):
            if self._tier == "cpu":
                torch.index_select(self._table, 0, ids_T, out=rows)
            else:
                unique, inverse = torch.unique(ids_T, return_inverse=True)
                read = self._source.read_rows(self._unit, unique.tolist(), self._row_bytes)
                table = torch.frombuffer(read, dtype=self._dtype).view(len(unique), self._width)
                torch.index_select(table, 0, inverse, out=rows)
            return rows.to(device=store.device.torch, dtype=store.dtype, non_blocking=True, copy=True)
