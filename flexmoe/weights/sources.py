"""Where weight bytes come from: a checkpoint's shards, or random numbers of realistic scale."""

from __future__ import annotations

import dataclasses
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch

from flexmoe.checkpoint.checkpoint import Checkpoint
from flexmoe.checkpoint.safetensors import TensorInfo
from flexmoe.checkpoint.unit_layout import FLOAT32_ROLES, Part, UnitLayout, unit_layout, views
from flexmoe.errors import StorageError
from flexmoe.system.direct_io import DirectFile, OnDone, Pending, Transfer, TransferQueue
from flexmoe.weights.recast import RecastFile, Rest
from policies.common.memory_units import SYSTEM_PAGE_BYTES, align_up
from policies.units import UnitId

_WRITERS = 4


class WeightSource(Protocol):
    """What the weight store needs of a source."""

    def layout(self, unit: UnitId) -> UnitLayout:
        """The unit's layout."""

    def prepare(self, disk_units: Sequence[UnitId]) -> None:
        """Called once, before any read, with the units whose home is the disk."""

    def read(self, unit: UnitId, buffer: torch.Tensor, pool: TransferQueue, on_done: OnDone | None = None) -> Pending:
        """Start filling ``buffer`` with the unit's bytes in its host layout."""

    def read_rows(self, unit: UnitId, rows: Sequence[int], row_bytes: int) -> bytearray:
        """The given rows of a one-tensor unit on disk."""


class _FileReader:
    """Reads units by their layout's extents; keeps every file open once."""

    def __init__(self) -> None:
        self._files: dict[str, DirectFile | RecastFile] = {}
        self._opening = threading.Lock()  # the weight stream and the loads of single experts read at once
        self._row_files: dict[str, int] = {}

    def adopt(self, file: DirectFile | RecastFile) -> None:
        """Use an already opened file for its path."""
        self._files[file.path] = file

    def read(
        self, name: str, layout: UnitLayout, buffer: torch.Tensor, pool: TransferQueue, on_done: OnDone | None
    ) -> Pending:
        bytes_ = buffer.numpy().data
        transfers = [
            Transfer(self._file(e.path), e.offset, bytes_[e.buffer_offset : e.buffer_offset + e.length], e.needed)
            for e in layout.extents
        ]
        return pool.submit(transfers, name, on_done)

    def rows(self, layout: UnitLayout, rows: Sequence[int], row_bytes: int) -> bytearray:
        """Rows are a few KiB each: read through the page cache, which serves frequent tokens from memory."""
        (extent,) = layout.extents
        (place,) = layout.host.values()
        start = extent.offset + place.offset - extent.buffer_offset
        recast = self._files.get(extent.path)
        if isinstance(recast, RecastFile):
            return _rows_of(recast, start, rows, row_bytes)
        if extent.path not in self._row_files:
            self._row_files[extent.path] = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
        result = bytearray()
        for row in rows:
            try:
                data = os.pread(self._row_files[extent.path], row_bytes, start + row * row_bytes)
            except OSError as e:
                raise StorageError(f"reading {extent.path} failed: {e.strerror}") from e
            if len(data) != row_bytes:
                raise StorageError(f"{extent.path} ended inside row {row} of the embedding table: it changed")
            result += data
        return result

    def _file(self, path: str) -> DirectFile | RecastFile:
        with self._opening:
            if path not in self._files:
                self._files[path] = DirectFile(path)
            return self._files[path]


def _rows_of(file: RecastFile, start: int, rows: Sequence[int], row_bytes: int) -> bytearray:
    result = bytearray(len(rows) * row_bytes)
    for at, row in enumerate(rows):
        file.read_into(memoryview(result)[at * row_bytes : (at + 1) * row_bytes], start + row * row_bytes)
    return result


class CheckpointSource:
    """Units read from a Hugging Face safetensors checkpoint.

    Args:
        checkpoint: an opened, checked checkpoint.
        parts: parts of each unit.
        rest: dtypes at rest.
        experts: parts of each single expert of a unit of several, by what it is as a unit of its own.

    Raises:
        StorageError: a file cannot be opened.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Mapping[UnitId, Sequence[Part]],
        rest: Rest,
        experts: Mapping[UnitId, Sequence[Part]] = MappingProxyType({}),
    ):
        recast = RecastFile.of(checkpoint.tensors, parts, rest)
        self._tensors, self._experts = {**checkpoint.tensors, **recast.tensors}, experts
        self._layouts = {unit: unit_layout(ps, self._tensors) for unit, ps in parts.items()}
        self._reader = _FileReader()
        self._reader.adopt(recast)

    def layout(self, unit: UnitId) -> UnitLayout:
        """The unit's layout, or that of a single expert."""
        if unit not in self._layouts:  # a model has thousands of experts, and a run may need none by itself
            self._layouts[unit] = unit_layout(self._experts[unit], self._tensors)
        return self._layouts[unit]

    def prepare(self, disk_units: Sequence[UnitId]) -> None:
        """Nothing to do: disk units are read from the checkpoint itself."""

    def read(self, unit: UnitId, buffer: torch.Tensor, pool: TransferQueue, on_done: OnDone | None = None) -> Pending:
        """Start reading the unit."""
        return self._reader.read(str(unit), self.layout(unit), buffer, pool, on_done)

    def read_rows(self, unit: UnitId, rows: Sequence[int], row_bytes: int) -> bytearray:
        """Rows of the embedding table."""
        return self._reader.rows(self._layouts[unit], rows, row_bytes)


class DummySource:
    """Random weights of realistic scale for a model of which only the shape is known.

    The numbers of a matrix depend on its name alone, so any placement and any grouping of experts of a dummy model computes
    the same. Norms are one, biases zero; routers are random and therefore balanced. Disk units are written out, each its own extent, so
    that reading them costs what reading a checkpoint costs.

    Args:
        parts: parts of each unit.
        dtype: dtype at rest.
        offload_dir: directory for the disk units' file.
        scale: standard deviation of the weights.
        experts: parts of each single expert of a unit of several, by what it is as a unit of its own.
    """

    _PATTERN_BYTES = 64 << 20

    def __init__(
        self,
        parts: Mapping[UnitId, Sequence[Part]],
        dtype: torch.dtype,
        offload_dir: Path,
        scale: float = 0.02,
        experts: Mapping[UnitId, Sequence[Part]] = MappingProxyType({}),
    ):
        self._path = Path(offload_dir) / f"dummy-weights-{os.getpid()}.bin"
        self._dtype = dtype
        self._layouts = {}
        self._names: dict[UnitId, dict[tuple[str, int], str]] = {}
        self._experts, self._tensors = experts, {}
        offset = 0
        for unit, ps in parts.items():
            for p in ps:
                own = torch.float32 if p.role in FLOAT32_ROLES else dtype
                name, size = _number_name(p), prod(p.shape) * own.itemsize
                self._tensors[name] = TensorInfo(
                    name=name, path=self._path, offset=offset, nbytes=size, dtype=own, shape=p.shape
                )
                offset += size
            numbered = _by_number_name(ps)
            self._names[unit] = {(p.role, p.into): p.tensor for p in numbered}
            self._layouts[unit] = unit_layout(numbered, self._tensors)
            offset = align_up(offset)
        generator = torch.Generator().manual_seed(0)
        count = self._PATTERN_BYTES // dtype.itemsize
        self._pattern = torch.randn(count, generator=generator).mul_(scale).to(dtype)
        self._on_disk: set[UnitId] = set()
        self._reader = _FileReader()

    def layout(self, unit: UnitId) -> UnitLayout:
        """The unit's layout, or that of a single expert, which is part of its unit on disk."""
        if unit not in self._layouts:
            self._layouts[unit] = unit_layout(_by_number_name(self._experts[unit]), self._tensors)
        return self._layouts[unit]

    def prepare(self, disk_units: Sequence[UnitId]) -> None:
        """Write the disk units to their file.

        Raises:
            StorageError: the offload directory cannot hold them.
        """
        if not disk_units:
            return
        file = DirectFile(self._path, writable=True)
        os.unlink(self._path)  # the open descriptors keep it; a killed run leaves nothing behind
        self._reader.adopt(file)
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda unit: self._write(file, unit), disk_units))
        self._on_disk.update(disk_units)
        file.sync()

    def _write(self, file: DirectFile, unit: UnitId) -> None:
        layout = self._layouts[unit]
        buffer = torch.zeros(layout.host_bytes + SYSTEM_PAGE_BYTES, dtype=torch.uint8)
        skip = -buffer.data_ptr() % SYSTEM_PAGE_BYTES
        buffer = buffer[skip : skip + layout.host_bytes]
        self._fill(unit, buffer)
        for e in layout.extents:
            file.write_from(buffer.numpy().data[e.buffer_offset : e.buffer_offset + e.length], e.offset)

    def read(self, unit: UnitId, buffer: torch.Tensor, pool: TransferQueue, on_done: OnDone | None = None) -> Pending:
        """Start reading the unit, or fill it at once when it is not on disk. Single experts are of units on disk."""
        if unit in self._on_disk or unit in self._experts:
            return self._reader.read(str(unit), self.layout(unit), buffer, pool, on_done)
        self._fill(unit, buffer)
        return Pending(0, on_done)

    def read_rows(self, unit: UnitId, rows: Sequence[int], row_bytes: int) -> bytearray:
        """Rows of the embedding table."""
        (place,) = self._layouts[unit].host.values()
        result = bytearray()
        start = self._start(self._names[unit]["embed", 0])
        for row in rows:
            result += self._numbers(start + row * place.shape[1], place.shape[1]).view(torch.uint8).numpy().tobytes()
        return result

    def _start(self, name: str) -> int:
        return zlib.crc32(name.encode()) % len(self._pattern)

    def _numbers(self, start: int, count: int) -> torch.Tensor:
        index = torch.arange(start, start + count).remainder_(len(self._pattern))
        return self._pattern[index]

    def _fill(self, unit: UnitId, buffer: torch.Tensor) -> None:
        for piece in self._layouts[unit].pieces:
            (tensor,) = views(buffer, {piece.role: piece.place}).values()
            if tensor.dim() == 1:
                tensor.fill_(0.0 if piece.role.endswith(("bias", "correction")) else 1.0)
                continue
            flat, done, start = tensor.view(-1), 0, self._start(self._names[unit][piece.role, piece.into])
            while done < flat.numel():
                numbers = self._pattern[start : start + flat.numel() - done]
                flat[done : done + len(numbers)] = numbers
                done, start = done + len(numbers), 0


def _by_number_name(parts: Sequence[Part]) -> list[Part]:
    return [dataclasses.replace(p, tensor=_number_name(p), first_element=0, whole=None) for p in parts]


def _number_name(part: Part) -> str:
    """What decides the numbers of a part; pieces of one tensor have their own."""
    return f"{part.tensor}/{part.first_element}"
