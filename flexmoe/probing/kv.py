"""What KV on the host and on disk costs, driven as the executor drives it.

`KVBench`: bytes/s at which the lanes bring past KV to the device and take new KV home. `BlockBench`: what pages on disk cost
beyond their bytes, by the runtime's own `DiskKV`. No page there is its row's previous one's neighbour, so each is read on its
own: what is found is the cost of a read, be it of one page or of several that are neighbours.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.kv.batch import Batch, Block, Run
from flexmoe.kv.cache import KVCache, KVShape, PageTable, RowKV
from flexmoe.kv.disk import DiskIndex, DiskKV
from flexmoe.kv.transfers import KVBuffers, KVLanes
from flexmoe.probing.disk import DiskRates, file_bytes, probe_directory
from flexmoe.probing.effort import Effort
from flexmoe.probing.timing import fill_with_noise, noise, repeat_s
from flexmoe.system.device import Device, Event
from flexmoe.system.direct_io import DirectFile
from flexmoe.system.trace import Recorder
from flexmoe.system.uploads import Uploads
from policies.admission.row_state import AttentionMode

_QUERY_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128  # Mixtral's
_LAYERS = 4
#: A prompt's run in the stores: every row stores so many tokens.
_STORED_TOKENS = 64
#: (KV heads, head size): blocks of 8 and of 64 KiB in 16 bits.
SHAPES = ((2, 64), (8, 128))
#: Blocks that a GPU batch reads in one layer.
_GROUP = 256
_FILL_POINTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRates:
    """Bytes/s of K and V together, of a GPU batch of so many ``rows``."""

    load: float
    store: float
    rows: int


class KVBench:
    """Rows of host-resident KV that one GPU batch fetches, in blocks that lie in no order.

    Args:
        device: compute device.
        dtype: of the KV.
        contexts: past tokens of each row.
    """

    def __init__(self, device: Device, dtype: torch.dtype, contexts: list[int]):
        self._device, self._shape = device, KVShape(layers=_LAYERS, kv_heads=_KV_HEADS, head_dim=_HEAD_DIM, dtype=dtype)
        blocks = sum(-(-(n + _STORED_TOKENS) // PAGE_TOKENS) for n in contexts)
        self._cache = KVCache(device, self._shape, {"gpu": 0, "cpu": blocks, "disk": 0})
        fill_with_noise(self._cache.cpu.view(-1))
        new_tokens = len(contexts) * _STORED_TOKENS
        buffers = KVBuffers(staging_pages=blocks, batch_tokens=new_tokens, write_pages=0)
        self._lanes = KVLanes(device, Recorder(), self._cache, buffers, _QUERY_HEADS)
        self._batch = self._plan(contexts)
        self._past_bytes, self._new_bytes = (n * self._shape.token_bytes for n in (sum(contexts), new_tokens))
        q = noise(device, dtype, new_tokens, _QUERY_HEADS, _HEAD_DIM)
        k, v = (noise(device, dtype, new_tokens, _KV_HEADS, _HEAD_DIM) for _ in range(2))
        self._new = q, k, v
        self._layer = 0
        self._loading: deque[Future[Event]] = deque()

    def rates(self, seconds: float) -> KVRates:
        """Measure both, for about ``seconds`` each."""
        with torch.inference_mode():
            load_s = self._each_s(self._load, seconds)
            self._arrived(0)
            store_s = self._each_s(self._store, seconds)
        return KVRates(
            load=self._past_bytes / load_s, store=self._new_bytes / store_s, rows=len(self._batch.groups[0].runs)
        )

    def close(self) -> None:
        """End the lanes' threads."""
        self._lanes.close()

    def _each_s(self, work: Callable[[], None], seconds: float) -> float:
        """A call ends when the KV of one load or store has arrived, so events around many calls are right too."""
        return repeat_s(self._device, work, seconds, warm=_LAYERS)

    def _load(self) -> None:
        """One more than there is to wait for: while a load is on the link, the next one's KV is gathered, as in a sweep."""
        self._loading.append(self._lanes.load(self._next_layer(), self._batch))
        self._arrived(1)

    def _arrived(self, left: int) -> None:
        """Wait for all loads but so many."""
        while len(self._loading) > left:
            self._loading.popleft().result().synchronize()

    def _store(self) -> None:
        self._lanes.store(self._next_layer(), self._batch, *self._new).result()
        self._lanes.drain()

    def _next_layer(self) -> int:
        """Layers in turn, as in a sweep: no cache holds what comes next."""
        self._layer = (self._layer + 1) % _LAYERS
        return self._layer

    def _plan(self, contexts: list[int]) -> Batch:
        ids = list(range(self._cache.total("cpu")))
        random.Random(0).shuffle(ids)
        runs = []
        for past in contexts:
            blocks = -(-(past + _STORED_TOKENS) // PAGE_TOKENS)
            row = RowKV("cpu", [PageTable(0, [ids.pop() for _ in range(blocks)])], past)
            runs.append(Run(row, [0] * _STORED_TOKENS, AttentionMode.FETCH, 1))
        block = Block(runs, len(runs))
        self._lanes.begin(block, Uploads(self._device))
        return block.batches[0]


def kv_rates(device: Device, dtype: torch.dtype, effort: Effort) -> KVRates:
    """Loads and stores of a GPU batch of rows, each with a context between the effort's shortest and longest."""
    first, last = effort.contexts
    token_bytes = 2 * _KV_HEADS * _HEAD_DIM * dtype.itemsize
    most = effort.buffer_bytes // (token_bytes * (last + _STORED_TOKENS + PAGE_TOKENS) * (_LAYERS + 4))
    rows = max(1, min(effort.fetched_rows, most))
    rng = random.Random(0)
    bench = KVBench(device, dtype, [rng.randint(first, last) for _ in range(rows)])
    try:
        return bench.rates(3 * effort.point_s)
    finally:
        bench.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBlockCosts:
    """Beyond the bytes: seconds and core-seconds of a read, seconds of a block's write."""

    read_s: float
    read_core_s: float
    write_s: float


@dataclass(frozen=True, slots=True)
class Rows:
    """A group of blocks as one row: the index that writes all of them, and the one that reads them."""

    write: DiskIndex
    read: DiskIndex


class BlockBench:
    """Blocks of one size in a file, in groups; `fill` comes first. ``block_bytes`` is their size.

    Args:
        device, dtype: as in a run.
        heads: (KV heads, head size).
        directory: where the file is.

    Raises:
        StorageError: the directory has too little free space.
    """

    def __init__(self, device: Device, dtype: torch.dtype, heads: tuple[int, int], directory: Path, effort: Effort):
        shape = KVShape(layers=1, kv_heads=heads[0], head_dim=heads[1], dtype=dtype)
        self.block_bytes = shape.token_bytes * PAGE_TOKENS
        blocks = min(effort.kv_blocks, file_bytes(directory, effort) // self.block_bytes)
        self._group = max(1, min(_GROUP, blocks, effort.buffer_bytes // 4 // self.block_bytes))
        count = blocks // self._group
        cache = KVCache(device, shape, {"gpu": 0, "cpu": 0, "disk": count * self._group}, 1, directory)
        self._cache, self._file = cache, cast(DirectFile, cache.file)  # it has disk pages
        self._disk = DiskKV(device, Recorder(), cache, self._group, self._group)
        self._new = tuple(torch.randn(self._group * PAGE_TOKENS, *heads).to(dtype) for _ in range(2))
        ids = iter(_scattered(count * self._group))
        self._groups = [self._rows(list(itertools.islice(ids, self._group))) for _ in range(count)]

    def fill(self, seconds: float) -> None:
        """Write every group, or as many as take ``seconds``; only those are read and written again."""
        del self._groups[len(list(self._written_s(seconds))) :]

    def read_costs(self, seconds: float) -> tuple[float, float]:
        """Seconds and core-seconds of a block, read for about ``seconds``."""
        took_s: list[float] = []
        groups, begin_core_s = itertools.cycle(self._groups), time.process_time()
        while sum(took_s) < seconds or not took_s:
            index, begin_s = next(groups).read, time.perf_counter()
            self._disk.read(0, index.pages, len(took_s) % 2)
            took_s.append(time.perf_counter() - begin_s)
        core_s = time.process_time() - begin_core_s
        return statistics.median(took_s) / self._group, core_s / len(took_s) / self._group

    def write_s(self, seconds: float) -> float:
        """Seconds of a block, written over for about ``seconds``; not flushed, as in a run."""
        self._file.sync()
        return statistics.median(self._written_s(seconds)) / self._group

    def close(self) -> None:
        """End the threads and close the file."""
        self._disk.close()
        self._cache.close_file()

    def _written_s(self, seconds: float) -> Iterator[float]:
        """Writes every group; gives the seconds of each, and ends when they add up to ``seconds``."""
        total_s = 0.0
        for group in self._groups:
            self._disk.store(0, group.write, *self._new)
            begin_s = time.perf_counter()
            self._disk.write(0, group.write)
            self._disk.drain()
            took_s = time.perf_counter() - begin_s
            yield took_s
            total_s += took_s
            if total_s > seconds:
                return

    def _rows(self, ids: list[int]) -> Rows:
        tokens = len(ids) * PAGE_TOKENS
        fills, follows = (
            Run(RowKV("disk", [PageTable(0, ids)], past, tail=0), [0] * count, AttentionMode.FETCH, 1)
            for past, count in ((0, tokens), (tokens, 1))
        )
        return Rows(write=DiskIndex.of([fills], self._cache), read=DiskIndex.of([follows], self._cache))


def kv_block_costs(
    device: Device, dtype: torch.dtype, directory: Path, effort: Effort, rates: DiskRates
) -> KVBlockCosts:
    """The mean over `SHAPES`; what the bytes take at ``rates`` is taken off.

    Raises:
        StorageError: the directory cannot be written or has too little free space.
    """
    with probe_directory(directory):
        found = [_costs(device, dtype, heads, directory, effort, rates) for heads in SHAPES]
    read_s, core_s, write_s = (max(0.0, statistics.fmean(values)) for values in zip(*found, strict=True))
    return KVBlockCosts(read_s=read_s, read_core_s=core_s, write_s=write_s)


def _costs(
    device: Device, dtype: torch.dtype, heads: tuple[int, int], directory: Path, effort: Effort, rates: DiskRates
) -> tuple[float, float, float]:
    """Of blocks of one size, beyond their bytes; below 0 where those take less than the rates say."""
    bench = BlockBench(device, dtype, heads, directory, effort)
    try:
        bench.fill(_FILL_POINTS * effort.point_s)
        write_s, (read_s, core_s) = bench.write_s(3 * effort.point_s), bench.read_costs(3 * effort.point_s)
    finally:
        bench.close()
    size = bench.block_bytes
    read_s, core_s = read_s - size / rates.read.bytes_per_s, core_s - size * rates.read.core_s_per_byte
    return read_s, core_s, write_s - size / rates.write.bytes_per_s


def _scattered(count: int) -> list[int]:
    """Block ids in no order, none followed by its neighbour: first the even ones, then the odd ones."""
    rng, order = random.Random(0), []
    for first in range(2):
        ids = list(range(first, count, 2))
        rng.shuffle(ids)
        order += ids
    return order
