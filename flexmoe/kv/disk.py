"""The disk tier of the KV cache: full pages in a file, the growing tail page of each row in host memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from flexmoe.kv.batch import Run
from flexmoe.kv.cache import KVCache, RowKV
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DiskPool, Pending, Transfer
from flexmoe.system.trace import Recorder


@dataclass(slots=True)
class DiskPlan:
    """Index tensors of the disk rows of one group for one sweep.

    Reading: ``pages`` are the full pages to read, in order; ``full_slots`` their tokens in the read buffer and
    ``tail_slots`` those in the tails, merged by ``order`` into the rows' token order. Writing: the runs' tokens are
    assembled in ``touched`` pages; ``begun`` (pages, tails) continue a tail, ``left`` (pages, tails) become the tail,
    ``filled`` are the (page, page id) that are full then.
    """

    pages: list[int] = field(default_factory=list)
    full_slots: torch.Tensor | None = None
    tail_slots: torch.Tensor | None = None
    order: torch.Tensor | None = None
    new_slots: torch.Tensor | None = None
    touched: int = 0
    begun: tuple[torch.Tensor, torch.Tensor] | None = None
    left: tuple[torch.Tensor, torch.Tensor] | None = None
    filled: list[tuple[int, int]] = field(default_factory=list)
    side: dict[int, int] = field(default_factory=dict)


def _slots(first_page: int, tokens: np.ndarray, size: int) -> np.ndarray:
    """Flat slots of K in a buffer of ``[2, page_tokens]`` pages; V lies ``page_tokens`` further."""
    return (first_page + tokens // size) * 2 * size + tokens % size


def _index(pieces: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


def _pairs(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def _interleave(spans: list[tuple[int, int]], second: int) -> torch.Tensor:
    """Index into [first source, second source] that takes (source, count) spans in turn."""
    at, pieces = [0, second], []
    for source, count in spans:
        pieces.append(np.arange(at[source], at[source] + count))
        at[source] += count
    return _index(pieces)


class DiskKV:
    """Reads, assembles and writes the pages of disk rows.

    A page in a buffer is ``[2 (K, V), page_tokens, G, Dh]``, as in the file.

    Args:
        device, recorder, cache: as in `KVLanes`.
        read_pages: most pages that one group reads in one layer.
        write_pages: most pages that the runs of one group touch in one layer.
    """

    def __init__(self, device: Device, recorder: Recorder, cache: KVCache, read_pages: int, write_pages: int):
        self._cache, self._active = cache, cache.file is not None
        if not self._active:
            return
        self._reader = DiskPool(recorder, "disk_read", threads=2, worker="kv")
        self._writer = DiskPool(recorder, "disk_write", threads=2, worker="kv")
        s = cache.shape
        self._tokens = (s.kv_heads, s.head_dim)
        self._read_buffers = [device.host_buffer(read_pages * cache.page_bytes) for _ in range(2)]
        self._write_buffers = [device.host_buffer(write_pages * cache.page_bytes) for _ in range(2)]
        self._writing: list[Pending | None] = [None, None]
        self._stored = 0

    def plan(self, runs: list[Run]) -> DiskPlan:
        """Index tensors for the disk rows of a group."""
        size = self._cache.page_tokens
        full, tails, order, new = [], [], [], []
        plan, begun, left = DiskPlan(), [], []
        for run in runs:
            past, kv = run.kv.length, run.kv
            whole = past // size * size
            order += [(0, whole), (1, past - whole)]
            full.append(_slots(len(plan.pages), np.arange(whole), size))
            tails.append(kv.tail * size + np.arange(past - whole))
            plan.pages += kv.pages[: past // size]
            if past % size:
                begun.append((plan.touched, kv.tail))
            new.append(self._plan_write(plan, kv, past, len(run.tokens)))
            if (past + len(run.tokens)) % size:
                left.append((plan.touched - 1, kv.tail))
        plan.full_slots, plan.tail_slots, plan.new_slots = _index(full), _index(tails), _index(new)
        plan.order = _interleave(order, len(plan.full_slots))
        plan.begun, plan.left = _pairs(begun), _pairs(left)
        return plan

    def _plan_write(self, plan: DiskPlan, kv: RowKV, past: int, count: int) -> np.ndarray:
        """Where a run's new tokens go in the write buffer; notes which pages they touch and which they fill."""
        size, base = self._cache.page_tokens, plan.touched
        first, last = past // size, (past + count - 1) // size
        plan.touched += last - first + 1
        complete = (past + count) // size
        plan.filled += [(base + b - first, kv.pages[b]) for b in range(first, min(last + 1, complete))]
        return _slots(base - first, np.arange(past, past + count), size)

    def read(self, layer: int, plan: DiskPlan, side: int) -> torch.Tensor:
        """Read the plan's full pages; returns them as flat token slots ``[pages * 2 * page_tokens, G, Dh]``."""
        size, buffer = self._cache.page_bytes, self._read_buffers[side]
        bytes_, transfers, i = memoryview(buffer.numpy()), [], 0
        while i < len(plan.pages):
            stop = i + 1
            while stop < len(plan.pages) and plan.pages[stop] == plan.pages[stop - 1] + 1:
                stop += 1
            piece = bytes_[i * size : stop * size]
            transfers.append(
                Transfer(self._cache.file, self._cache.disk_offset(layer, plan.pages[i]), piece, len(piece))
            )
            i = stop
        self._reader.submit(transfers, f"kv {layer}").wait()
        return self._flat(buffer, len(plan.pages))

    def gather(self, layer: int, which: int, plan: DiskPlan, raw: torch.Tensor, out: torch.Tensor) -> None:
        """Past K (``which`` 0) or V (1) of the disk rows into ``out`` ``[tokens, G, Dh]``, in row order."""
        shift = which * self._cache.page_tokens
        full = raw.index_select(0, plan.full_slots + shift)
        tails = self._cache.tail[layer, which].flatten(0, 1).index_select(0, plan.tail_slots)
        torch.index_select(torch.cat([full, tails]), 0, plan.order, out=out)

    def store(self, layer: int, plan: DiskPlan, k: torch.Tensor, v: torch.Tensor) -> None:
        """Assemble the touched pages from the tails and the new tokens, and put what is not full back into tails."""
        side = self._stored % 2
        self._stored += 1
        if self._writing[side] is not None:
            self._writing[side].wait()
            self._writing[side] = None
        plan.side[layer] = side
        size = self._cache.page_tokens
        flat = self._flat(self._write_buffers[side], len(self._write_buffers[side]) // self._cache.page_bytes)
        pages = flat.view(-1, 2, size, *self._tokens)
        (begun, begun_tails), (left, left_tails) = plan.begun, plan.left
        for which, new in enumerate((k, v)):
            tail = self._cache.tail[layer, which]
            pages[:, which].index_copy_(0, begun, tail.index_select(0, begun_tails))
            flat.index_copy_(0, plan.new_slots + which * size, new)
            tail.index_copy_(0, left_tails, pages[:, which].index_select(0, left))

    def write(self, layer: int, plan: DiskPlan) -> None:
        """Start writing the pages that are full; `drain` or the buffer's next use waits for them."""
        side = plan.side.pop(layer)
        size = self._cache.page_bytes
        bytes_ = memoryview(self._write_buffers[side].numpy())
        transfers = []
        for at, page in plan.filled:
            piece = bytes_[at * size : (at + 1) * size]
            transfers.append(Transfer(self._cache.file, self._cache.disk_offset(layer, page), piece, size))
        self._writing[side] = self._writer.submit(transfers, f"kv {layer}")

    def drain(self) -> None:
        """Wait for the writes under way."""
        for pending in self._writing if self._active else ():
            if pending is not None:
                pending.wait()

    def close(self) -> None:
        """End the threads."""
        if self._active:
            self._reader.close()
            self._writer.close()

    def _flat(self, buffer: torch.Tensor, pages: int) -> torch.Tensor:
        used = buffer[: pages * self._cache.page_bytes].view(self._cache.shape.dtype)
        return used.view(pages * 2 * self._cache.page_tokens, *self._tokens)
