"""Ragged KV cache: pages of a fixed number of tokens in three tiers, a page table per row, reference counts.

A pool holds, per layer, K and V of its pages: ``[L, 2, pages, page_tokens, G, w]``, where w is the head size, or the words of
a compressed head (`flexmoe.formats.packed_kv`). A row lives in one tier. On the
disk tier only full pages are on disk; the growing tail page of a row stays in host memory. This file knows
where bytes live; `flexmoe.kv.transfers` moves them.

Legend: L layers, G KV heads, Dh head size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.formats.packed_kv import WORD, head_words, pack
from flexmoe.system.device import Device, forget_pages
from flexmoe.system.direct_io import DirectFile
from policies.common.memory_units import align_up


class KVExhausted(Exception):
    """A tier has no free page left: the scheduler sends a row back."""


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
        runs: list[tuple[int, int]] = []
        for page in sorted(self._free):
            if runs and sum(runs[-1]) == page:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((page, 1))
        return runs

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
class RowKV:
    """The cache of one row: its tier, its page table and how many tokens are stored.

    ``tail`` is the host slot of a disk row's growing page, -1 elsewhere.
    """

    tier: str
    pages: list[int] = field(default_factory=list)
    length: int = 0
    tail: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What a token's KV looks like: ``dtype`` is what it is computed in, and stored in unless it is ``compressed``."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    compressed: bool = False

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
        self.page_bytes = shape.token_bytes * page_tokens
        self.disk_page_bytes = align_up(self.page_bytes)
        self.gpu = self._pool(device, pages["gpu"], on_device=True)
        self.cpu = self._pool(device, pages["cpu"], on_device=False)
        self.tail = self._pool(device, tails, on_device=False)
        self.file: DirectFile | None = None
        if pages["disk"]:
            path = Path(offload_dir or ".") / f"kv-{os.getpid()}-{id(self)}.bin"
            self.file = DirectFile(path, writable=True)
            os.unlink(path)  # the descriptor keeps it; a killed run leaves nothing behind

    def pages_for(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens of one row."""
        return -(-tokens // self.page_tokens)

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
        return RowKV(tier, tail=self._tails.take() if tier == "disk" else -1)

    def reserve(self, row: RowKV, tokens: int) -> None:
        """Make room for ``tokens`` more tokens of the row; all or nothing.

        Raises:
            KVExhausted: its tier has too few free pages.
        """
        allocator = self._allocators[row.tier]
        missing = self.pages_for(row.length + tokens) - len(row.pages)
        if missing > allocator.free:
            raise KVExhausted
        for _ in range(missing):
            row.pages.append(allocator.take(after=row.pages[-1] if row.pages else -1))

    def truncate(self, row: RowKV, length: int) -> None:
        """Forget the tokens from ``length`` on and free the pages that only they needed.

        Raises:
            ValueError: the row has fewer tokens; or its next token would be written into a page that it shares or, on
                disk, that has been written already.
        """
        if not 0 <= length <= row.length:
            raise ValueError(f"cannot truncate a row of {row.length} tokens to {length}")
        keep = self.pages_for(length)
        if row.tier == "disk" and length % self.page_tokens and keep < self.pages_for(row.length + 1):
            raise ValueError("a disk row can only be cut inside its tail or at a page boundary")
        allocator = self._allocators[row.tier]
        if length % self.page_tokens and allocator.is_shared(row.pages[keep - 1]):
            raise ValueError("a row cannot be cut inside a page that is shared with another row")
        for page in reversed(row.pages[keep:]):  # the next row then begins where this one did
            allocator.drop(page)
        del row.pages[keep:]
        row.length = length

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
        full = row.length // self.page_tokens
        grows = self.pages_for(row.length) > full
        if grows and not allocator.free:
            raise KVExhausted
        twin = self.open(row.tier)
        twin.pages = [allocator.share(b) for b in row.pages[:full]]
        twin.length = row.length
        if grows:
            twin.pages.append(allocator.take())
            pool = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.tail}[row.tier]
            source = row.tail if row.tier == "disk" else row.pages[full]
            target = twin.tail if row.tier == "disk" else twin.pages[full]
            pool[:, :, target] = pool[:, :, source]
        return twin

    def share(self, row: RowKV, tokens: int) -> RowKV:
        """A hold on the row's first ``tokens`` tokens, whole pages that are filled: rows are forked from it, and the
        pages stay while it or any of them is open. It takes no page and no tail, and does not grow."""
        allocator = self._allocators[row.tier]
        pages = [allocator.share(b) for b in row.pages[: tokens // self.page_tokens]]
        return RowKV(row.tier, pages=pages, length=len(pages) * self.page_tokens)

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
        return (layer * self.total("disk") + page) * self.disk_page_bytes

    def _pool(self, device: Device, pages: int, *, on_device: bool) -> torch.Tensor:
        s = self.shape
        shape = (s.layers, 2, pages, self.page_tokens, *s.stored_token)
        size = s.layers * pages * self.page_bytes
        if on_device and device.is_cuda:
            # Rows of a benchmark attend pages that nobody wrote; what lies there by chance may not be finite.
            return torch.zeros(shape, dtype=s.stored_dtype, device=device.torch)
        return device.host_buffer(size)[:size].view(s.stored_dtype).view(shape)
