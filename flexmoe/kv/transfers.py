"""Moves KV between its tiers and the places where it is attended; every transfer runs on a lane of its own.

Three kinds of rows meet in a GPU batch. ``gpu`` rows are attended where they live. ``fetch`` rows' used tokens are
brought into a paged staging buffer on the device. ``cpu`` rows are attended in host memory: queries go down, outputs
come up. New KV of a row goes to its home: a host pool, or the row's tail page and, when that is full, the disk.

Two sets of buffers alternate, so that the next batch is brought while this one is attended.

On device cpu the thread that computes does all of it when a batch is to be attended, as it would take the same cores; only the
disk is at work meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from flexmoe.kernels.elementwise import NewKV
from flexmoe.kernels.paged_attention import Kernel, choose_kernel, paged_attention, plan_attention
from flexmoe.kv.batch import Arrived, Batch, Block, Group, begun
from flexmoe.kv.cache import KVCache, PageCopy, neighbours
from flexmoe.kv.disk import DiskIndex, DiskKV
from flexmoe.kv.group_index import FetchIndex, GroupIndex, HostIndex, index_group, on_device
from flexmoe.system.deferred import Deferred
from flexmoe.system.device import Device, Event
from flexmoe.system.trace import Recorder
from flexmoe.system.uploads import Uploads, Wanted
from policies.admission.row_state import AttentionMode

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBuffers:
    """How large the transfer buffers are; `cost_model.memory.allocation` plans them.

    Attributes:
        staging_pages: pages of one layer that a fetched GPU batch may need.
        batch_tokens: most tokens of a GPU batch in one sweep (its runs).
        write_pages: pages that the runs of a batch may touch on the disk tier.
        gather_pages: pages of one layer that attention on CUDA copies side by side.
    """

    staging_pages: int
    batch_tokens: int
    write_pages: int
    gather_pages: int = 0


class KVLanes:
    """Lanes ``h2d`` (KV loads), ``d2h`` (stores) and ``cpu`` (CPU attention), one thread each on device cuda.

    Args:
        device: compute device.
        recorder: where bytes and times go.
        cache: the pools.
        buffers: planned sizes; zero staging pages when no row is ever fetched.
        query_heads: H.
        sinks: heads have sinks.
    """

    def __init__(
        self,
        device: Device,
        recorder: Recorder,
        cache: KVCache,
        buffers: KVBuffers,
        query_heads: int,
        sinks: bool = False,
    ):
        self._device, self._recorder, self._cache = device, recorder, cache
        self._query_heads, self._has_sinks = query_heads, sinks
        self._lanes = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("h2d", "d2h", "cpu")}
        # Outputs of CPU attention, which the GPU waits for, do not queue behind KV on its way up.
        self._streams = {name: device.stream(urgent=name == "up") for name in ("h2d", "d2h", "up")}
        self._stores: list[Future[None]] = []
        self._loads = self._stored = 0
        s = cache.shape
        token, stored = s.stored_token, s.stored_dtype
        flat = (2, buffers.staging_pages * cache.page_tokens, *token)
        self._staging = [torch.zeros(flat, dtype=stored, device=device.torch) for _ in range(2)]
        self._packed = [self._host(flat, stored) for _ in range(2)]
        self._landing = torch.empty(flat[1:], dtype=stored, device=device.torch) if device.is_cuda else None
        gathered = (2, buffers.gather_pages, cache.page_tokens, s.kv_heads, s.head_dim)
        self._gathered = torch.empty(gathered, dtype=s.dtype, device=device.torch) if buffers.gather_pages else None
        self._shares = bool(buffers.gather_pages) and self._kernel().shares(
            device.torch, s.dtype
        )  # tried before any sweep
        host_tokens = buffers.batch_tokens if device.is_cuda else 0  # on cpu the tensors already are host memory
        self._down = [self._host((2, host_tokens, *token), stored) for _ in range(2)]
        self._queries = [self._host((2, host_tokens, query_heads, s.head_dim), s.dtype) for _ in range(2)]
        self._sinks = [self._host((1, query_heads), s.dtype) if sinks and device.is_cuda else None for _ in range(2)]
        self._staging_read = [device.record(), device.record()]
        self._packed_read = [device.record(), device.record()]
        self._placed = device.record()
        self._disk: DiskKV | None = None  # made last, since it starts threads
        if cache.file is not None:
            self._disk = DiskKV(device, recorder, cache, buffers.staging_pages, buffers.write_pages)

    def begin(self, block: Block, uploads: Uploads, others: Iterable[Wanted] = ()) -> None:
        """Derive the index tensors of a sweep; called once per sweep, before its first operation.

        Args:
            uploads: brings those that the device uses there.
            others: what else goes up with them.
        """
        for batch in block.batches:
            for group in batch.groups:
                batch.kv[group.mode] = [
                    self._indexed(group, at, layers.window) for at, layers in enumerate(self._cache.shape.groups)
                ]
        indices = (index for batch in block.batches for each in batch.kv.values() for index in each)
        self._placed = uploads.place([*others, *(wanted for index in indices for wanted in on_device(index))])

    def _indexed(self, group: Group, layers: int, window: int | None) -> GroupIndex:
        index = index_group(group, self._cache, layers)
        if group.mode is not AttentionMode.CPU:
            self._plan_attention(index, window)
        return index

    def _plan_attention(self, index: GroupIndex, window: int | None) -> None:
        """Of rows that the compute device attends to."""
        shape, room = self._cache.shape, 0 if self._gathered is None else self._gathered.shape[1]
        if room:
            plan_attention(
                index.ragged,
                self._kernel(),
                shape.dtype,
                heads=self._query_heads,
                shared=self._query_heads // shape.kv_heads,
                page_tokens=self._cache.page_tokens,
                room=room,
                window=window,
                sinks=self._has_sinks,
                shares=self._shares,
            )

    def _kernel(self) -> Kernel:
        shape = self._cache.shape
        return choose_kernel(self._device.torch, shape.dtype, shape.head_dim, self._has_sinks)

    def _index(self, layer: int, batch: Batch, mode: AttentionMode) -> Any:
        """That of a batch's rows of a mode, for a layer."""
        return batch.kv[mode][self._cache.group_of[layer]]

    def new_kv(self, layer: int, batch: Batch) -> NewKV | None:
        """Where the new KV of the batch's ``gpu`` rows goes, in the device pool; the family's `project` writes it there."""
        if AttentionMode.GPU not in batch.kv:
            return None
        index: GroupIndex = self._index(layer, batch, AttentionMode.GPU)
        k_pool, v_pool = self._cache.on_gpu(layer)
        return NewKV(k_pool, v_pool, index.home, index.group.start, index.group.stop)

    def as_stored(self, batch: Batch, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values as the cache stores them, ``[T, G, w]``, which the operations below take for ``fetch`` and ``cpu``
        rows; a batch without such rows has no use for them, and its are left as they are."""
        if all(mode is AttentionMode.GPU for mode in batch.kv):
            return k_TGd, v_TGd
        return self._cache.shape.as_stored(k_TGd), self._cache.shape.as_stored(v_TGd)

    # Operations of the schedule. Those that return a future have been handed to a lane.

    def load(self, layer: int, batch: Batch) -> Future[Event]:
        """Bring the past KV of the batch's ``fetch`` rows to the device; the future gives the event to wait for."""
        side = self._loads % 2
        self._loads += 1
        index: FetchIndex = self._index(layer, batch, AttentionMode.FETCH)
        index.sides[layer] = side
        arriving = None if self._device.is_cuda else self._begin_read(layer, index, side)
        return self._submit("h2d", self._load, layer, index, side, arriving)

    def store(
        self,
        layer: int,
        batch: Batch,
        q_THd: torch.Tensor,
        k_TGw: torch.Tensor,
        v_TGw: torch.Tensor,
        after: Sequence[Future[Event]] = (),
        sinks_H: torch.Tensor | None = None,
    ) -> Future[None]:
        """Take the new KV of the batch's ``fetch`` and ``cpu`` rows to its home (and the ``cpu`` rows' queries down, with sinks).

        Args:
            after: what it waits for: where rows are on disk, whose tails it moves on, until their past KV is loaded.
        """
        side = batch.side = self._stored % 2
        self._stored += 1
        produced = self._device.record()
        made = q_THd, k_TGw, v_TGw, sinks_H
        batch.stored = self._submit("d2h", self._store, layer, batch, side, made, produced, after)
        self._stores.append(batch.stored)
        return batch.stored

    def write(self, layer: int, batch: Batch) -> Future[None]:
        """Write the pages that the store filled to disk.

        Raises:
            ValueError: no row of the batch is on disk.
        """
        index: FetchIndex = self._index(layer, batch, AttentionMode.FETCH)
        if index.disk is None:
            raise ValueError("no row of this batch has its KV on disk")
        batch.written = self._submit("d2h", self._write, layer, index.disk, begun(batch.stored))
        self._stores.append(batch.written)
        return batch.written

    def cpu_attend(self, layer: int, batch: Batch, stored: Future[None]) -> Future[Arrived]:
        """Attend the batch's ``cpu`` rows on the host; the future gives `Arrived` with ``[tokens, H, Dh]``."""
        index: HostIndex = self._index(layer, batch, AttentionMode.CPU)
        return self._submit("cpu", self._cpu_attend, layer, index, batch.side, stored)

    def settle(self, batch: Batch) -> None:
        """The batch is to be attended: on device cpu, take its new KV home.

        Raises:
            StorageError: a disk transfer failed.
        """
        for future in (batch.stored, batch.written):
            if isinstance(future, Deferred):
                future.result()

    def attend_gpu(
        self, layer: int, batch: Batch, q_THd: torch.Tensor, sinks_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of the batch's ``gpu`` rows."""
        index: GroupIndex = self._index(layer, batch, AttentionMode.GPU)
        k_pool, v_pool = self._cache.on_gpu(layer)
        q_THd = q_THd[index.group.start : index.group.stop]
        return self._attend(layer, q_THd, k_pool, v_pool, index, sinks_H)

    def attend_fetched(
        self,
        layer: int,
        batch: Batch,
        q_THd: torch.Tensor,
        k_TGw: torch.Tensor,
        v_TGw: torch.Tensor,
        loaded: Event,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the batch's ``fetch`` rows over the staging buffer."""
        index: FetchIndex = self._index(layer, batch, AttentionMode.FETCH)
        side = index.sides.pop(layer)
        loaded.wait(self._device.compute)
        tokens = slice(index.group.start, index.group.stop)
        staging = self._staging[side]
        for flat, new in zip(staging, (k_TGw, v_TGw)):
            flat.index_copy_(0, index.staged_new, new[tokens])
        k_pool, v_pool = staging.view(2, -1, self._cache.page_tokens, *staging.shape[2:])
        out = self._attend(layer, q_THd[tokens], k_pool, v_pool, index, sinks_H)
        self._staging_read[side] = self._device.record()
        return out

    def _attend(
        self,
        layer: int,
        q_THd: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        index: GroupIndex,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """On the compute device, whose stream orders the uses of the buffer for copies of K and V."""
        window = self._cache.window_of(layer)
        return paged_attention(
            q_THd, k_pool, v_pool, index.ragged, window=window, sinks=sinks_H, workspace=self._gathered
        )

    def copy(self, copies: Iterable[PageCopy]) -> None:
        """Copy pages from tier to tier, one after the other, between two sweeps: what has been computed is in its home then, and
        the buffers are free. Host memory that it reads or writes is nobody else's until it returns.

        Raises:
            StorageError: a disk transfer failed.
        """
        for copy in copies:
            for layer in range(self._cache.shape.layers):
                self._copy(layer, copy, *copy.pages[self._cache.group_of[layer]])
            self._wait_for_copies()

    def drain(self) -> None:
        """Wait until all new KV is home; raises what a lane met."""
        stores, self._stores = self._stores, []
        for future in stores:
            future.result()
        if self._disk is not None:
            self._disk.drain()

    def close(self) -> None:
        """End the threads."""
        for lane in self._lanes.values():
            lane.shutdown(wait=True)
        for stream in filter(None, self._streams.values()):
            stream.synchronize()  # buffers are freed after this
        if self._disk is not None:
            self._disk.close()

    @property
    def _on_disk(self) -> DiskKV:
        if self._disk is None:
            raise RuntimeError("this KV cache has no disk tier")
        return self._disk

    # Between two sweeps.

    def _copy(self, layer: int, copy: PageCopy, sources: list[int], targets: list[int]) -> None:
        if copy.source == "disk":
            there, step = self._pool(layer, copy.target), self._on_disk.read_pages
            for at in range(0, len(sources), step):
                read = self._on_disk.read(layer, sources[at : at + step], 0)
                self._put(layer, copy, [(pages, there[:, page]) for pages, page in zip(read, targets[at:])])
                self._wait_for_copies()
        elif copy.target == "disk":
            here, staged = self._pool(layer, copy.source), self._on_disk.staged()
            for at in range(0, len(sources), len(staged)):
                self._put(layer, copy, [(here[:, page], pages) for page, pages in zip(sources[at:], staged)])
                self._wait_for_copies()
                self._on_disk.write_staged(layer, targets[at : at + len(staged)])
        else:
            here, there = self._pool(layer, copy.source), self._pool(layer, copy.target)
            runs = [(run.start, run.stop - run.start) for run in neighbours(sources, targets)]
            pieces = [(here.narrow(1, sources[at], n), there.narrow(1, targets[at], n)) for at, n in runs]
            self._put(layer, copy, pieces)

    def _pool(self, layer: int, tier: str) -> torch.Tensor:
        return self._cache.on_gpu(layer) if tier == "gpu" else self._cache.on_cpu(layer)

    def _put(self, layer: int, copy: PageCopy, pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy keys and values ``[2, ...]``, each of them contiguous, from the first of each pair to the second. The compute stream
        orders it behind what has written, and before what will read, the device's pages."""
        name, nbytes = f"prefix {layer}", sum(source.numel() * source.element_size() for source, _ in pieces)
        timed = self._recorder.span("d2h/home", name)  # from host memory to host memory
        if "gpu" in (copy.source, copy.target):
            lane = "h2d/prefix" if copy.target == "gpu" else "d2h/prefix"
            timed = self._device.timed(self._recorder, lane, name, nbytes)
        with self._device.computing(), timed:
            for source, target in pieces:
                for k_or_v in range(2):
                    target[k_or_v].copy_(source[k_or_v], non_blocking=True)

    def _wait_for_copies(self) -> None:
        """For the host, which may write what has been read, or read what has been written."""
        copied = self._device.record()
        self._device.link.small(copied)
        self._device.host_wait(copied)

    def _submit(self, lane: str, work: Callable[..., T], *args: Any) -> Future[T]:
        """For a lane's thread to do; on device cpu, for whoever waits for it."""
        return self._lanes[lane].submit(work, *args) if self._device.is_cuda else Deferred(work, *args)

    # What the lanes do.

    def _begin_read(self, layer: int, index: FetchIndex, side: int) -> Callable[[], torch.Tensor] | None:
        """Of what is on disk; None: nothing is."""
        return None if index.disk is None else self._on_disk.begin_read(layer, index.disk.pages, side)

    def _load(
        self, layer: int, index: FetchIndex, side: int, arriving: Callable[[], torch.Tensor] | None = None
    ) -> Event:
        """While one side's copies are under way, the other side's KV is gathered."""
        arriving = arriving or self._begin_read(layer, index, side)
        raw = arriving() if arriving else None
        self._packed_read[side].synchronize()  # by the copies of the load before the last; on this lane's own thread
        stream = self._streams["h2d"]
        self._placed.wait(stream)
        self._staging_read[side].wait(stream)
        for which in range(2):
            packed = self._packed[side][which, : index.past_tokens]
            with self._recorder.span("h2d/gather", f"gather kv {layer}"):
                count = len(index.past_home)
                pool = self._cache.on_cpu(layer)[which].flatten(0, 1)
                torch.index_select(pool, 0, index.past_home, out=packed[:count])
                if index.disk is not None and raw is not None:
                    self._on_disk.gather(layer, which, index.disk, raw, packed[count:])
            nbytes = packed.numel() * packed.element_size()
            with self._device.on(stream), self._device.timed(self._recorder, "h2d/kv", f"kv {layer}", nbytes, stream):
                arrived = packed
                if self._landing is not None:
                    arrived = self._landing[: index.past_tokens].copy_(packed, non_blocking=True)
                self._staging[side][which].index_copy_(0, index.staged_past, arrived)
        event = self._packed_read[side] = self._device.record(stream)
        return event

    def _store(
        self,
        layer: int,
        batch: Batch,
        side: int,
        made: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
        produced: Event,
        after: Sequence[Future[Event]],
    ) -> None:
        """Take ``made``, queries, keys, values and sinks, to the host and KV on to its home."""
        for future in after:
            future.result()
        indices: list[GroupIndex] = [
            self._index(layer, batch, mode) for mode in batch.kv if mode is not AttentionMode.GPU
        ]
        start, stop = min(i.group.start for i in indices), max(i.group.stop for i in indices)
        q, k, v, sinks = made
        nbytes = (stop - start) * self._cache.shape.token_bytes
        k, v, *queries = self._bring_down(
            side,
            f"kv {layer}",
            nbytes,
            produced,
            k[start:stop],
            v[start:stop],
            *(tensor for i in _on_host(indices) for tensor in (_own(q, i), sinks) if tensor is not None),
        )
        with self._recorder.span("d2h/home", f"kv {layer}"):
            for index in indices:
                here = slice(index.group.start - start, index.group.stop - start)
                self._store_group(layer, index, k[here], v[here])
        for host in _on_host(indices):
            host.queries, *given = queries
            host.sinks = given[0] if given else None

    def _write(self, layer: int, index: DiskIndex, stored: Future[None]) -> None:
        stored.result()
        self._on_disk.write(layer, index)

    def _store_group(self, layer: int, index: GroupIndex, k: torch.Tensor, v: torch.Tensor) -> None:
        """New KV of a group, on the host, to its home; rows on disk are the last of a group."""
        count = len(index.home)
        for pool, new in zip(self._cache.on_cpu(layer), (k, v)):
            pool.flatten(0, 1).index_copy_(0, index.home, new[:count])
        if isinstance(index, FetchIndex) and index.disk is not None:
            self._on_disk.store(layer, index.disk, k[count:], v[count:])

    def _bring_down(
        self, side: int, name: str, nbytes: int, produced: Event, *tensors: torch.Tensor
    ) -> list[torch.Tensor]:
        """Host copies of K, V and, where rows are attended on the CPU, of their queries, in pinned buffers. The caller holds the
        tensors until the copies are done.

        Args:
            name, nbytes: how the copies are recorded.
        """
        stream = self._streams["d2h"]
        if stream is None:
            with self._recorder.span("d2h", name, nbytes):  # they are there
                return list(tensors)
        sinks = self._sinks[side]
        buffers = [self._down[side][0], self._down[side][1], self._queries[side][0]]
        buffers += [] if sinks is None else [sinks[0]]
        produced.wait(stream)
        with self._device.on(stream), self._device.timed(self._recorder, "d2h", name, nbytes, stream):
            down = [buffer[: len(tensor)].copy_(tensor, non_blocking=True) for tensor, buffer in zip(tensors, buffers)]
        self._device.record(stream).synchronize()  # this lane's own thread; nobody else waits
        return down

    def _cpu_attend(self, layer: int, index: HostIndex, side: int, stored: Future[None]) -> Arrived:
        stored.result()
        k_pool, v_pool = self._cache.on_cpu(layer)
        window = self._cache.window_of(layer)
        pinned = self._queries[side][1][: len(index.queries)] if self._device.is_cuda else None
        with self._recorder.span(
            "cpu", f"attend {layer}", index.ragged.seen_tokens(window) * self._cache.shape.token_bytes
        ):
            out = paged_attention(
                index.queries, k_pool, v_pool, index.ragged, window=window, sinks=index.sinks, out=pinned
            )
        stream, nbytes = self._streams["up"], out.numel() * out.element_size()
        if stream is None:
            return Arrived(out, self._device.record())  # it is there
        with (
            self._device.on(stream),
            self._device.timed(self._recorder, "h2d/attended", f"attended {layer}", nbytes, stream),
        ):
            # The pinned buffer is free again when the compute stream has passed the batch's next projection.
            arrived = Arrived(out.to(self._device.torch, non_blocking=True), self._device.record(stream))
        self._device.link.small(arrived.event)
        return arrived

    def _host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._device.host_buffer(size)[:size].view(dtype).view(shape)


def _on_host(indices: Iterable[GroupIndex]) -> list[HostIndex]:
    """Of the rows that are attended on the CPU: one at most in a GPU batch."""
    return [index for index in indices if isinstance(index, HostIndex)]


def _own(tensor: torch.Tensor, index: GroupIndex) -> torch.Tensor:
    """The part of a batch's tensor that belongs to a group."""
    return tensor[index.group.start : index.group.stop]
