"""Ragged KV cache: pages of a fixed number of tokens in three tiers, a page table per row, reference counts.

A page has some tokens of a row in the layers of one group (`LayerGroup`). All groups have equally many layers, L, and share the
pages of a pool: ``[L, 2, pages, page_tokens, G, w]``, where w is the head size, or the words of a compressed
head (`flexmoe.formats.packed_kv`). A row lives in one tier, and has a page table for each group. Where
layers have a window, pages that no query to come sees are given back (`policies.admission.kv_pages`). On the disk tier only full
pages are on disk; the growing tail page of a row stays in host memory, of all layers. This file knows where bytes live;
`flexmoe.kv.transfers` moves them.

Legend: L layers of a group, G KV heads, Dh head size.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cost_model.memory.allocation import PAGE_TOKENS, kv_layout
from cost_model.model.arch import LayerGroup
from flexmoe.formats.packed_kv import WORD, head_words, pack
from flexmoe.system.device import Device, forget_pages
from flexmoe.system.direct_io import DirectFile
from policies.common.memory_units import align_up


class KVExhausted(Exception):
    """A tier has no free page left: the scheduler sends a row back."""


def neighbours(*pages: Sequence[int]) -> Iterator[slice]:
    """Places of pages that are neighbours, of several lists those that are so in all of them."""
    start, count = 0, len(pages[0])
    while start < count:
        stop = start + 1
        while stop < count and all(each[stop] == each[stop - 1] + 1 for each in pages):
            stop += 1
        yield slice(start, stop)
        start = stop


class PageAllocator:
    """Hands out page ids of one tier and counts who shares them.

    A row's pages are neighbours as far as that goes: neighbours on disk are read at once.
    """

    def __init__(self, pages: int):
        self.total = pages
        self._free = dict.fromkeys(range(pages - 1, -1, -1))
        self._references = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def free_runs(self) -> list[tuple[int, int]]:
        """Free pages as (first, how many) of neighbours."""
        pages = sorted(self._free)
        return [(pages[run.start], run.stop - run.start) for run in neighbours(pages)]

    def take(self, after: int = -1) -> int:
        """A free page, held once: the one that follows ``after`` if it is free, else the one that was freed last.

        Raises:
            KVExhausted: there is none.
        """
        if not self._free:
            raise KVExhausted
        if after + 1 in self._free and after >= 0:
            page = after + 1
            del self._free[page]
        else:
            page, _ = self._free.popitem()
        self._references[page] = 1
        return page

    def share(self, page: int) -> int:
        """Hold a page once more."""
        self._references[page] += 1
        return page

    def is_shared(self, page: int) -> bool:
        """Whether a page is held more than once: then nobody may write into it."""
        return self._references[page] > 1

    def drop(self, page: int) -> None:
        """Give up one hold; the last one frees the page."""
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free[page] = None


@dataclass(slots=True)
class PageTable:
    """The pages of a row in one group of layers, from its page number ``first`` on; those before are given back."""

    first: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The number behind its last page."""
        return self.first + len(self.pages)


@dataclass(slots=True)
class RowKV:
    """The cache of one row: its tier, a page table for each group of layers and how many tokens are stored.

    ``tail`` is the host slot of a disk row's growing page, -1 elsewhere. ``shared`` says which pages it has in common with other
    rows: (tokens from the first one on, a number) of each beginning, the shortest first; rows with the same number have it.
    """

    tier: str
    tables: list[PageTable]
    length: int = 0
    tail: int = -1
    shared: tuple[tuple[int, int], ...] = ()

    @property
    def pages(self) -> list[int]:
        """All pages that it holds, group by group."""
        return [page for table in self.tables for page in table.pages]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopy:
    """Pages to be copied from a tier to another one (`flexmoe.kv.transfers`).

    Attributes:
        source, target: the tiers.
        pages: of each group of layers, the pages of the source and those of the target, as many.
    """

    source: str
    target: str
    pages: tuple[tuple[list[int], list[int]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What a token's KV looks like.

    Args:
        layers: how many.
        kv_heads, head_dim: of K and of V.
        dtype: what they are computed in, and stored in unless ``compressed``.
        groups: the layers in groups of equally many; default: one, which sees all tokens.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    compressed: bool = False
    groups: tuple[LayerGroup, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", (LayerGroup(None, tuple(range(self.layers))),))

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the pools."""
        return WORD if self.compressed else self.dtype

    @property
    def stored_token(self) -> tuple[int, int]:
        """Keys, or values, of a token in one layer as they are stored: heads, and elements of each."""
        return self.kv_heads, head_words(self.head_dim) if self.compressed else self.head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        heads, width = self.stored_token
        return 2 * heads * width * self.stored_dtype.itemsize

    def as_stored(self, x_TGd: torch.Tensor) -> torch.Tensor:
        """Keys or values as they are stored, `[T, G, w]`."""
        return pack(x_TGd) if self.compressed else x_TGd


class KVCache:
    """The three pools and the rows in them.

    Args:
        device: compute device; the ``gpu`` pool lives there.
        shape: layers, heads, dtype.
        pages: pages per tier.
        tails: rows that the disk tier can hold at once (one host page each).
        offload_dir: directory of the disk tier's file.
        page_tokens: tokens per page.

    Attributes:
        page_bytes: of a page in one layer.
        disk_page_bytes: what it takes in the file, where direct reads and writes want it to begin at a boundary.
    """

    def __init__(
        self,
        device: Device,
        shape: KVShape,
        pages: dict[str, int],
        tails: int = 0,
        offload_dir: Path | None = None,
        page_tokens: int = PAGE_TOKENS,
    ):
        self.shape, self.page_tokens, self._is_cuda = shape, page_tokens, device.is_cuda
        self._allocators = {tier: PageAllocator(n) for tier, n in pages.items()}
        self._tails = PageAllocator(tails)
        self._numbers = itertools.count()
        self.page_bytes = shape.token_bytes * page_tokens
        self.layout = kv_layout(shape.groups, page_tokens)
        places = {layer: (at, place) for at, g in enumerate(shape.groups) for place, layer in enumerate(g.layers)}
        #: Of each layer, the number of its group, and its place in the pools.
        self.group_of, self._place_of = ([places[layer][i] for layer in range(shape.layers)] for i in (0, 1))
        self.disk_page_bytes = align_up(self.page_bytes)
        self.gpu = self._pool(device, pages["gpu"], on_device=True)
        self.cpu = self._pool(device, pages["cpu"], on_device=False)
        self.tail = self._pool(device, tails, on_device=False, layers=shape.layers)
        self.file: DirectFile | None = None
        if pages["disk"]:
            path = Path(offload_dir or ".") / f"kv-{os.getpid()}-{id(self)}.bin"
            self.file = DirectFile(path, writable=True)
            os.unlink(path)  # the descriptor keeps it; a killed run leaves nothing behind

    def on_gpu(self, layer: int) -> torch.Tensor:
        """K and V of a layer, ``[2, pages, page_tokens, G, Dh]``, in the ``gpu`` pool."""
        return self.gpu[self._place_of[layer]]

    def on_cpu(self, layer: int) -> torch.Tensor:
        """The same in the ``cpu`` pool."""
        return self.cpu[self._place_of[layer]]

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer looks back."""
        return self.shape.groups[self.group_of[layer]].window

    def total(self, tier: str) -> int:
        """Pages of a tier."""
        return self._allocators[tier].total

    def free(self, tier: str) -> int:
        """Pages of a tier that no row holds."""
        return self._allocators[tier].free

    @property
    def tails(self) -> int:
        """Rows that the disk tier can hold at once."""
        return self._tails.total

    @property
    def free_tails(self) -> int:
        """Rows that the disk tier can still take."""
        return self._tails.free

    def open(self, tier: str) -> RowKV:
        """An empty row in ``tier``.

        Raises:
            KVExhausted: the disk tier has no tail slot left.
        """
        tail = self._tails.take() if tier == "disk" else -1
        return RowKV(tier, [PageTable() for _ in self.shape.groups], tail=tail)

    def reserve(self, row: RowKV, tokens: int) -> None:
        """Make room for a run of ``tokens`` more tokens of the row, all or nothing; pages that it does not see are given back.

        Raises:
            KVExhausted: its tier has too few free pages.
        """
        allocator, end = self._allocators[row.tier], self.layout.covering(row.length + tokens)
        self._drop_before(row, self.layout.run_from(row.length, tokens))
        missing = [max(0, end - table.end) for table in row.tables]
        if sum(missing) > allocator.free:
            raise KVExhausted
        for table, count in zip(row.tables, missing):
            for _ in range(count):
                table.pages.append(allocator.take(after=table.pages[-1] if table.pages else -1))

    def advance(self, row: RowKV, length: int) -> None:
        """The row's run is stored, and so are ``length`` tokens: what only the run needed is given back."""
        row.length = length
        self._drop_before(row, self.layout.kept_from(length))

    def open_aged(self, tier: str, length: int) -> RowKV:
        """A row of which so many tokens are stored, whatever its pages hold.

        Raises:
            KVExhausted: the tier has too few free pages.
        """
        row = self.open(tier)
        row.length = length
        for table, group in zip(row.tables, self.shape.groups):
            table.first = 0 if group.window is None else self.layout.kept_from(length)
        self.reserve(row, 0)
        return row

    def _drop_before(self, row: RowKV, first: int) -> None:
        """Give back the pages of windowed layers before number ``first``."""
        for table, group in zip(row.tables, self.shape.groups):
            if group.window is None or table.first >= first:
                continue
            for page in table.pages[: first - table.first]:
                self._allocators[row.tier].drop(page)
            del table.pages[: first - table.first]
            table.first = first

    def truncate(self, row: RowKV, length: int) -> None:
        """Forget the tokens from ``length`` on and free the pages that only they needed.

        Raises:
            ValueError: the row has fewer tokens; or its next token would be written into a page that it shares or, on
                disk, that has been written already, or would see a page that has been given back.
        """
        if not 0 <= length <= row.length:
            raise ValueError(f"cannot truncate a row of {row.length} tokens to {length}")
        keep, inside = self.layout.covering(length), length % self.page_tokens
        if row.tier == "disk" and inside and keep < self.layout.covering(row.length + 1):
            raise ValueError("a disk row can only be cut inside its tail or at a page boundary")
        if length and any(table.first > self.layout.first(length) for table in row.tables):
            raise ValueError("a row cannot be cut where its next token sees what is behind the window already")
        allocator = self._allocators[row.tier]
        if inside and any(allocator.is_shared(table.pages[keep - 1 - table.first]) for table in row.tables):
            raise ValueError("a row cannot be cut inside a page that is shared with another row")
        for table in row.tables:
            for page in reversed(
                table.pages[max(0, keep - table.first) :]
            ):  # the next row then begins where this one did
                allocator.drop(page)
            del table.pages[max(0, keep - table.first) :]
            table.first = table.first if length else 0
        row.length = length
        row.shared = tuple(each for each in row.shared if each[0] <= length)

    def close(self, row: RowKV) -> None:
        """Free everything the row holds."""
        self.truncate(row, 0)
        if row.tail >= 0:
            self._tails.drop(row.tail)
            row.tail = -1

    def fork(self, row: RowKV) -> RowKV:
        """A second row with the same tokens: full pages are shared, the growing one is copied.

        Raises:
            KVExhausted: no page is free for the copy.
        """
        allocator = self._allocators[row.tier]
        full, grows = row.length // self.page_tokens, row.length % self.page_tokens > 0
        if grows and allocator.free < len(row.tables):
            raise KVExhausted
        twin = self.open(row.tier)
        twin.tables, twin.length, twin.shared = self._shared_tables(row, 0, full), row.length, row.shared
        for own, source in zip(twin.tables, row.tables) if grows else ():
            own.pages.append(allocator.take())
            if row.tier != "disk":
                pool = self.gpu if row.tier == "gpu" else self.cpu
                pool[:, :, own.pages[-1]] = pool[:, :, source.pages[full - source.first]]
        if grows and row.tier == "disk":
            self.tail[:, :, twin.tail] = self.tail[:, :, row.tail]
        return twin

    def _shared_tables(self, row: RowKV, first: int, end: int) -> list[PageTable]:
        """Holds on the row's pages up to number ``end``, of windowed layers from number ``first`` on."""
        tables, share = [], self._allocators[row.tier].share
        for table, group in zip(row.tables, self.shape.groups):
            begin = table.first if group.window is None else max(table.first, first)
            pages = table.pages[begin - table.first : end - table.first]
            tables.append(PageTable(begin, [share(page) for page in pages]))
        return tables

    def share(self, row: RowKV, tokens: int) -> RowKV:
        """A hold on the row's first ``tokens`` tokens, whole pages that are filled, as far as what follows them sees them: rows
        are forked from it, and the pages stay while it or any of them is open. It takes no page and no tail, and does not grow.

        Raises:
            ValueError: the row has given back a page that what follows would see, or longer beginnings are shared already.
        """
        end = tokens // self.page_tokens
        first = self.layout.first(end * self.page_tokens)
        if any(table.first > (0 if g.window is None else first) for table, g in zip(row.tables, self.shape.groups)):
            raise ValueError(f"the row has gone on, and what follows its first {tokens} tokens would see what is gone")
        if row.shared and row.shared[-1][0] >= end * self.page_tokens:
            raise ValueError(f"the row's first {row.shared[-1][0]} tokens are shared already")
        row.shared = (*row.shared, (end * self.page_tokens, next(self._numbers)))
        tables = self._shared_tables(row, first, end)
        return RowKV(row.tier, tables, length=end * self.page_tokens, shared=row.shared)

    def copy_shared(self, source: RowKV, tier: str, begun: RowKV | None = None) -> tuple[RowKV, PageCopy]:
        """The same for rows of another tier: a hold on pages there, whose bytes are still to be copied.

        Args:
            source: what `share` has given, or this.
            tier: another one than the source's.
            begun: of the tokens, those of a shorter beginning that are there already; of windowed layers they are copied again.

        Raises:
            KVExhausted: the tier has too few free pages.
        """
        allocator, have = self._allocators[tier], 0 if begun is None else begun.length // self.page_tokens
        firsts = [have if g.window is None else given.first for given, g in zip(source.tables, self.shape.groups)]
        copied = [given.pages[first - given.first :] for given, first in zip(source.tables, firsts)]
        if sum(map(len, copied)) > allocator.free:
            raise KVExhausted
        tables = [PageTable() for _ in firsts] if begun is None else self._shared_tables(begun, have, have)
        for table, first, pages in zip(tables, firsts, copied):
            table.first = first - len(table.pages)
            for _ in pages:
                table.pages.append(allocator.take(after=table.pages[-1] if table.pages else -1))
        places = (table.pages[first - table.first :] for table, first in zip(tables, firsts))
        shared = *(() if begun is None else begun.shared), (source.length, next(self._numbers))
        copy = PageCopy(source=source.tier, target=tier, pages=tuple(zip(copied, places)))
        return RowKV(tier, tables, source.length, shared=shared), copy

    def forget_free(self) -> None:
        """Give the memory of pages that no row holds back to the system, as far as it is neither pinned nor a GPU's."""
        if self._is_cuda:
            return
        half = self.page_bytes // 2  # of K or V
        for tier, pool in (("gpu", self.gpu), ("cpu", self.cpu)):
            runs = self._allocators[tier].free_runs()
            for keys_or_values in pool.flatten(0, 1):
                for first, count in runs:
                    forget_pages(keys_or_values.data_ptr() + first * half, count * half)

    def close_file(self) -> None:
        """Close the disk tier's file; a second call does nothing."""
        if self.file is not None:
            self.file.close()

    def disk_offset(self, layer: int, page: int) -> int:
        """Byte offset of a page of a layer in the disk tier's file: a row's neighbouring pages are neighbours."""
        return (self._place_of[layer] * self.total("disk") + page) * self.disk_page_bytes

    def _pool(self, device: Device, pages: int, *, on_device: bool, layers: int | None = None) -> torch.Tensor:
        s, layers = self.shape, layers or len(self.shape.groups[0].layers)
        shape = (layers, 2, pages, self.page_tokens, *s.stored_token)
        size = layers * pages * self.page_bytes
        if on_device and device.is_cuda:
            # Rows of a benchmark attend pages that nobody wrote; what lies there by chance may not be finite.
            return torch.zeros(shape, dtype=s.stored_dtype, device=device.torch)
        return device.host_buffer(size)[:size].view(s.stored_dtype).view(shape)
