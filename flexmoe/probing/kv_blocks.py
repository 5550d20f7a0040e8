"""What KV blocks on disk cost beyond their bytes, by the runtime's own `DiskKV`.

No block here is its row's previous one's neighbour, so each is read on its own. What is found is the cost of a read,
be it of one block or of several that are neighbours.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.kv.batch import Run
from flexmoe.kv.cache import KVCache, KVShape, RowKV
from flexmoe.kv.disk import DiskKV, DiskPlan
from flexmoe.probing.disk import DiskRates, file_bytes, probe_directory
from flexmoe.probing.effort import Effort
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from policies.admission.row_state import AttentionMode

#: (KV heads, head size): blocks of 8 and of 64 KiB in 16 bits.
SHAPES = ((2, 64), (8, 128))
#: Blocks that a GPU batch reads in one layer.
_GROUP = 256
_FILL_POINTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBlockCosts:
    """Beyond the bytes: seconds and core-seconds of a read, seconds of a block's write."""

    read_s: float
    read_core_s: float
    write_s: float


@dataclass(frozen=True, slots=True)
class Rows:
    """A group of blocks as one row: the plan that writes all of them, and the plan that reads them."""

    write: DiskPlan
    read: DiskPlan


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
        self._cache, self._file = cache, cache.file
        self._disk = DiskKV(device, Recorder(), cache, self._group, self._group)
        self._new = tuple(torch.randn(self._group * PAGE_TOKENS, *heads).to(dtype) for _ in range(2))
        ids = iter(_scattered(count * self._group))
        self._groups = [self._rows(list(itertools.islice(ids, self._group))) for _ in range(count)]

    def fill(self, seconds: float) -> None:
        """Write every group, or as many as take ``seconds``; only those are read and written again."""
        del self._groups[len(list(self._written_s(seconds))) :]

    def read_costs(self, seconds: float) -> tuple[float, float]:
        """Seconds and core-seconds of a block, read for about ``seconds``."""
        took_s, groups, begin_core_s = [], itertools.cycle(self._groups), time.process_time()
        while sum(took_s) < seconds or not took_s:
            plan, begin_s = next(groups).read, time.perf_counter()
            self._disk.read(0, plan, len(took_s) % 2)
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
            Run(RowKV("disk", ids, past, tail=0), [0] * count, AttentionMode.FETCH, 1)
            for past, count in ((0, tokens), (tokens, 1))
        )
        return Rows(write=self._disk.plan([fills]), read=self._disk.plan([follows]))


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
