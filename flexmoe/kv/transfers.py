"""Moves KV between its tiers and the places where it is attended; every transfer runs on a lane of its own.

Three kinds of rows meet in a GPU batch. ``gpu`` rows are attended where they live. ``fetch`` rows' used tokens are
brought into a paged staging buffer on the device. ``cpu`` rows are attended in host memory: queries go down, outputs
come up. New KV of a row goes to its home: a host pool, or the row's tail page and, when that is full, the disk.

Two sets of buffers alternate, so that the next batch is brought while this one is attended.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from flexmoe.kernels.paged_attention import Ragged, paged_attention
from flexmoe.kv.batch import Batch, Block, Group
from flexmoe.kv.cache import KVCache, token_slots
from flexmoe.kv.disk import DiskKV
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from policies.admission.row_state import AttentionMode


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBuffers:
    """How large the transfer buffers are; `cost_model.memory.allocation` plans them.

    Attributes:
        staging_pages: pages of one layer that a fetched GPU batch may need.
        batch_tokens: most tokens of a GPU batch in one sweep (its runs).
        write_pages: pages that the runs of a batch may touch on the disk tier.
    """

    staging_pages: int
    batch_tokens: int
    write_pages: int


@dataclass(slots=True)
class Arrived:
    """A result on the device: wait for ``event`` on the stream that reads it."""

    tensor: torch.Tensor | None
    event: object


class KVLanes:
    """Lanes ``h2d`` (KV loads), ``d2h`` (stores) and ``cpu`` (CPU attention), one thread each.

    Args:
        device: compute device.
        recorder: where bytes and times go.
        cache: the pools.
        buffers: planned sizes; zero staging pages when no row is ever fetched.
        query_heads: H.
        window: sliding window, or None.
    """

    def __init__(
        self,
        device: Device,
        recorder: Recorder,
        cache: KVCache,
        buffers: KVBuffers,
        query_heads: int,
        window: int | None,
    ):
        self._device, self._recorder, self._cache, self._window = device, recorder, cache, window
        self._lanes = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("h2d", "d2h", "cpu")}
        self._streams = {name: device.stream() for name in ("h2d", "d2h")}
        self._disk = DiskKV(device, recorder, cache, buffers.staging_pages, buffers.write_pages)
        self._stores: list[Future] = []
        self._loads = 0
        s = cache.shape
        token = (s.kv_heads, s.head_dim)
        flat = (2, buffers.staging_pages * cache.page_tokens, *token)
        self._staging = [torch.zeros(flat, dtype=s.dtype, device=device.torch) for _ in range(2)]
        self._packed = [self._host(flat) for _ in range(2)]
        self._landing = torch.empty(flat[1:], dtype=s.dtype, device=device.torch) if device.is_cuda else None
        host_tokens = buffers.batch_tokens if device.is_cuda else 0  # on cpu the tensors already are host memory
        self._down = [self._host((2, host_tokens, *token)) for _ in range(2)]
        self._queries = [self._host((2, host_tokens, query_heads, s.head_dim)) for _ in range(2)]
        self._staging_read = [device.record(), device.record()]

    def begin(self, block: Block) -> None:
        """Derive the index tensors of a sweep; called once per sweep, before its first operation."""
        for batch in block.batches:
            for group in batch.groups:
                batch.kv[group.mode] = self._plan(group)

    # Operations of the schedule. Those that return a future have been handed to a lane.

    def append(self, layer: int, batch: Batch, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> None:
        """Write the new KV of the batch's ``gpu`` rows into the device pool."""
        plan = batch.kv.get(AttentionMode.GPU)
        if plan is not None:
            tokens = slice(plan.group.start, plan.group.stop)
            for pool, new in zip(self._cache.gpu[layer], (k_TGd, v_TGd)):
                pool.flatten(0, 1).index_copy_(0, plan.home, new[tokens])

    def load(self, layer: int, batch: Batch) -> Future:
        """Bring the past KV of the batch's ``fetch`` rows to the device; the future gives `Arrived`."""
        side = self._loads % 2
        self._loads += 1
        plan = batch.kv[AttentionMode.FETCH]
        plan.sides[layer] = side
        return self._lanes["h2d"].submit(self._load, layer, plan, side)

    def store(self, layer: int, batch: Batch, q, k, v, loaded: Future | None) -> Future:
        """Take the new KV of the batch's ``fetch`` and ``cpu`` rows to its home (and the ``cpu`` rows' queries down).

        It waits until the batch's past KV is ``loaded``, because storing moves the tails of disk rows on.
        """
        side = batch.index % 2
        produced = self._device.record()
        future = self._lanes["d2h"].submit(self._store, layer, batch, side, q, k, v, produced, loaded)
        self._stores.append(future)
        return future

    def write(self, layer: int, batch: Batch) -> Future:
        """Write the pages that the store filled to disk."""
        plan = batch.kv[AttentionMode.FETCH]
        future = self._lanes["d2h"].submit(self._disk.write, layer, plan.disk)
        self._stores.append(future)
        return future

    def cpu_attend(self, layer: int, batch: Batch, stored: Future) -> Future:
        """Attend the batch's ``cpu`` rows on the host; the future gives `Arrived` with ``[tokens, H, Dh]``."""
        return self._lanes["cpu"].submit(self._cpu_attend, layer, batch.kv[AttentionMode.CPU], batch.index % 2, stored)

    def attend_gpu(self, layer: int, batch: Batch, q: torch.Tensor) -> torch.Tensor:
        """Attention of the batch's ``gpu`` rows."""
        plan = batch.kv[AttentionMode.GPU]
        k_pool, v_pool = self._cache.gpu[layer]
        q = q[plan.group.start : plan.group.stop]
        return paged_attention(q, k_pool, v_pool, plan.ragged, window=self._window)

    def attend_fetched(self, layer: int, batch: Batch, q, k, v, loaded: Arrived) -> torch.Tensor:
        """Attention of the batch's ``fetch`` rows over the staging buffer."""
        plan = batch.kv[AttentionMode.FETCH]
        side = plan.sides.pop(layer)
        loaded.event.wait()
        tokens = slice(plan.group.start, plan.group.stop)
        staging = self._staging[side]
        for flat, new in zip(staging, (k, v)):
            flat.index_copy_(0, plan.staged_new, new[tokens])
        k_pool, v_pool = staging.view(2, -1, self._cache.page_tokens, *staging.shape[2:])
        out = paged_attention(q[tokens], k_pool, v_pool, plan.ragged, window=self._window)
        self._staging_read[side] = self._device.record()
        return out

    def drain(self) -> None:
        """Wait until all new KV is home; raises what a lane met."""
        stores, self._stores = self._stores, []
        for future in stores:
            future.result()
        self._disk.drain()

    def close(self) -> None:
        """End the threads."""
        for lane in self._lanes.values():
            lane.shutdown(wait=True)
        for stream in filter(None, self._streams.values()):
            stream.synchronize()  # buffers are freed after this
        self._disk.close()

    # What the lanes do.

    def _load(self, layer: int, plan: _Plan, side: int) -> Arrived:
        width = self._cache.shape.token_bytes
        raw = self._disk.read(layer, plan.disk, side) if plan.disk else None
        with self._device.on(self._streams["h2d"]):
            self._staging_read[side].wait()
            with self._recorder.span("h2d/kv", f"kv {layer}", plan.past_tokens * width):
                packed = self._packed[side][:, : plan.past_tokens]
                count = len(plan.past_home)
                for which in range(2):
                    pool = self._cache.cpu[layer, which].flatten(0, 1)
                    torch.index_select(pool, 0, plan.past_home, out=packed[which, :count])
                    if plan.disk:
                        self._disk.gather(layer, which, plan.disk, raw, packed[which, count:])
                    arrived = packed[which]
                    if self._landing is not None:
                        arrived = self._landing[: plan.past_tokens].copy_(arrived, non_blocking=True)
                    self._staging[side][which].index_copy_(0, plan.staged_past, arrived)
            event = self._device.record()
        if self._device.is_cuda:
            event.synchronize()  # the packed buffer is filled again by the load after next
        return Arrived(None, event)

    def _store(self, layer: int, batch: Batch, side: int, q, k, v, produced, loaded: Future | None) -> None:
        if loaded is not None:
            loaded.result()
        plans = [p for mode, p in batch.kv.items() if mode is not AttentionMode.GPU]
        start, stop = min(p.group.start for p in plans), max(p.group.stop for p in plans)
        k, v, q = self._bring_down(side, produced, k[start:stop], v[start:stop], q[start:stop])
        for plan in plans:
            here = slice(plan.group.start - start, plan.group.stop - start)
            count = len(plan.home)
            with self._recorder.span("d2h", f"kv {layer}", (here.stop - here.start) * self._cache.shape.token_bytes):
                for pool, new in zip(self._cache.cpu[layer], (k[here], v[here])):
                    pool.flatten(0, 1).index_copy_(0, plan.home, new[:count])
                if plan.disk:
                    self._disk.store(layer, plan.disk, k[here][count:], v[here][count:])
            if plan.group.mode is AttentionMode.CPU:
                plan.queries = q[here]

    def _bring_down(self, side: int, produced, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Host copies of device tensors, in pinned buffers. The caller holds the tensors until the copies are done."""
        if not self._device.is_cuda:
            return list(tensors)
        buffers = [self._down[side][0], self._down[side][1], self._queries[side][0]]
        stream = self._streams["d2h"]
        down = []
        with self._device.on(stream):
            produced.wait()
            for tensor, buffer in zip(tensors, buffers):
                down.append(buffer[: len(tensor)].copy_(tensor, non_blocking=True))
            self._device.record().synchronize()  # this lane's own thread; nobody else waits
        return down

    def _cpu_attend(self, layer: int, plan: _Plan, side: int, stored: Future) -> Arrived:
        stored.result()
        k_pool, v_pool = self._cache.cpu[layer]
        pinned = self._queries[side][1][: len(plan.queries)] if self._device.is_cuda else None
        with self._recorder.span("cpu", f"attend {layer}", plan.ragged.kv_tokens * self._cache.shape.token_bytes):
            out = paged_attention(plan.queries, k_pool, v_pool, plan.ragged, window=self._window, out=pinned)
        with self._device.on(self._streams["h2d"]):
            # The pinned buffer is free again when the compute stream has passed the batch's next projection.
            return Arrived(out.to(self._device.torch, non_blocking=True), self._device.record())

    # Index tensors.

    def _plan(self, group: Group) -> _Plan:
        home_rows = [r for r in group.runs if r.kv.tier != "disk"]
        disk_rows = [r for r in group.runs if r.kv.tier == "disk"]
        plan = _Plan(group, _index(self._slots(r.kv.pages, r.kv.length, len(r.tokens)) for r in home_rows))
        if group.mode is not AttentionMode.FETCH:
            plan.home = plan.home.to(self._device.torch if group.mode is AttentionMode.GPU else "cpu")
            plan.ragged = group.ragged([r.kv.pages for r in group.runs])
            return plan
        plan.disk = self._disk.plan(disk_rows) if disk_rows else None
        plan.past_home = _index(self._slots(r.kv.pages, 0, r.kv.length) for r in home_rows)
        tables, staged_past, staged_new, base = [], [], [], 0
        for r in group.runs:
            pages = self._cache.pages_for(r.kv.length + len(r.tokens))
            tables.append(list(range(base, base + pages)))
            staged_past.append(self._slots(tables[-1], 0, r.kv.length))
            staged_new.append(self._slots(tables[-1], r.kv.length, len(r.tokens)))
            base += pages
        plan.staged_past = _index(staged_past).to(self._device.torch)
        plan.staged_new = _index(staged_new).to(self._device.torch)
        plan.past_tokens = len(plan.staged_past)
        plan.ragged = group.ragged(tables)
        return plan

    def _slots(self, pages: list[int], first: int, count: int) -> np.ndarray:
        """Flat token slots of tokens ``[first, first + count)`` of a row with this page table."""
        return token_slots(np.asarray(pages, dtype=np.int64), np.arange(first, first + count), self._cache.page_tokens)

    def _host(self, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self._cache.shape.dtype
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._device.host_buffer(size)[:size].view(dtype).view(shape)


def _index(pieces: Iterable[np.ndarray]) -> torch.Tensor:
    """One int64 index tensor of several arrays."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *pieces]))


@dataclass(slots=True)
class _Plan:
    """Index tensors of one group for one sweep.

    ``home``: pool slots of the new tokens of rows in a pool. ``past_home``, ``staged_past``, ``staged_new``: where past
    tokens come from, and where past and new ones lie in the staging buffer. ``disk``: the disk rows' share of it.
    """

    group: Group
    home: torch.Tensor
    ragged: Ragged | None = None
    past_home: torch.Tensor | None = None
    past_tokens: int = 0
    staged_past: torch.Tensor | None = None
    staged_new: torch.Tensor | None = None
    disk: object = None
    queries: torch.Tensor | None = None
    sides: dict | None = None

    def __post_init__(self):
        self.sides = {}
