"""The disk tier of the KV cache: full pages in a file, the growing tail page of each row in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cost_model.memory.allocation import KV_TRANSFERS
from flexmoe.kv.batch import Run
from flexmoe.kv.cache import KVCache, neighbours
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DiskPool, Pending, Transfer
from flexmoe.system.trace import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskIndex:
    """Index tensors of the disk rows of one group for one sweep.

    What a layer sees of the past is read from the file, in full pages, and from the tails. Its new tokens are assembled in the write
    buffer, in pages numbered from 0.

    Attributes:
        pages: the full pages to read, in order.
        tail_slots: the tokens in the tails.
        order: merges the tokens of the pages and those of the tails into the rows' token order.
        new_slots: where the new tokens go: (pages of the write buffer, tokens of the page).
        begun: (pages of the write buffer, tails) whose tokens are in the tails already.
        left: (pages of the write buffer, tails) that do not become full, and are tails again.
        filled: (page of the write buffer, page of the file) that become full.
        sides: which of the two write buffers a layer under way has.
    """

    pages: list[int]
    tail_slots: torch.Tensor
    order: torch.Tensor
    new_slots: tuple[torch.Tensor, torch.Tensor]
    begun: tuple[torch.Tensor, torch.Tensor]
    left: tuple[torch.Tensor, torch.Tensor]
    filled: list[tuple[int, int]]
    sides: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, runs: Sequence[Run], cache: KVCache, layers: int = 0, skipped: Sequence[int] | None = None
    ) -> DiskIndex:
        """Of runs of disk rows, each of at least one token.

        Args:
            layers: number of a group of layers. With a window, pages that are not seen are neither read nor written.
            skipped: of each run, the first pages that need not be read; default: none.
        """
        size, layout = cache.page_tokens, cache.layout
        windowed = cache.shape.groups[layers].window is not None
        touched = 0  # pages of the write buffer that the runs so far touch
        pages: list[int] = []
        filled: list[tuple[int, int]] = []
        tails, order, new_pages, new_tokens, begun, left = [], [], [], [], [], []
        for run, skip in zip(runs, skipped or (0,) * len(runs)):
            kv, past, end = run.kv, run.kv.length, run.kv.length + len(run.tokens)
            first, last, whole = past // size, (end - 1) // size, past // size * size
            table, seen, kept = kv.tables[layers], skip, 0
            if windowed:
                seen, kept = layout.first(past), layout.kept_from(end)
            tails.append(kv.tail * size + np.arange(past - whole))
            order += [(0, whole - seen * size), (1, past - whole)]
            pages += table.pages[seen - table.first : first - table.first]
            if past % size:
                begun.append((touched, kv.tail))
            new = np.arange(past, end)
            new_pages.append(touched - first + new // size)
            new_tokens.append(new % size)
            filled += [
                (touched + page - first, table.pages[page - table.first])
                for page in range(max(first, kept), end // size)
            ]
            touched += last - first + 1
            if end % size:
                left.append((touched - 1, kv.tail))
        return cls(
            pages=pages,
            tail_slots=_index(tails),
            order=_interleave(order, len(pages) * size),
            new_slots=(_index(new_pages), _index(new_tokens)),
            begun=_pairs(begun),
            left=_pairs(left),
            filled=filled,
        )


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

    A page in a buffer is ``[2 (K, V), page_tokens, G, w]``, as in the file, and what is left up to the boundary of the next.

    Args:
        device, recorder, cache: as in `KVLanes`.
        read_pages: most pages that one group reads in one layer.
        write_pages: most pages that the runs of one group touch in one layer.

    Attributes:
        read_pages: as given; no `read` may have more.

    Raises:
        ValueError: the cache has no disk tier.
    """

    def __init__(self, device: Device, recorder: Recorder, cache: KVCache, read_pages: int, write_pages: int):
        if cache.file is None:
            raise ValueError("this KV cache has no disk tier")
        self._cache, self._file = cache, cache.file
        self._read_buffers = [device.host_buffer(read_pages * cache.disk_page_bytes) for _ in range(2)]
        self._write_buffers = [device.host_buffer(write_pages * cache.disk_page_bytes) for _ in range(2)]
        self._writing: list[Pending | None] = [None, None]
        self._stored, self.read_pages = 0, read_pages
        # Last, since they start threads.
        self._reader = DiskPool(recorder, "disk_read", threads=KV_TRANSFERS, worker="kv")
        self._writer = DiskPool(recorder, "disk_write", threads=KV_TRANSFERS, worker="kv")

    def read(self, layer: int, pages: Sequence[int], side: int) -> torch.Tensor:
        """Read full pages; returns them, ``[pages, 2, page_tokens, G, w]``."""
        return self.begin_read(layer, pages, side)()

    def begin_read(self, layer: int, pages: Sequence[int], side: int) -> Callable[[], torch.Tensor]:
        """Start reading full pages; what it returns waits for them and gives them as `read` does."""
        buffer = self._read_buffers[side]
        pending = self._reader.submit(self._transfers(layer, pages, buffer), f"kv {layer}")

        def arrived() -> torch.Tensor:
            pending.wait()
            return self._pages(buffer)[: len(pages)]

        return arrived

    def staged(self) -> torch.Tensor:
        """The pages of a buffer, ``[pages, 2, page_tokens, G, w]``: to be filled between two sweeps and written by
        `write_staged`."""
        return self._pages(self._write_buffers[0])

    def write_staged(self, layer: int, pages: Sequence[int]) -> None:
        """Write as many of them to these pages of the file."""
        self._writer.submit(self._transfers(layer, pages, self._write_buffers[0]), f"kv {layer}").wait()

    def _transfers(self, layer: int, pages: Sequence[int], buffer: torch.Tensor) -> list[Transfer]:
        """Between pages of the file, neighbours at once, and the first ones of a buffer."""
        size, bytes_, found = self._cache.disk_page_bytes, buffer.numpy().data, []
        for run in neighbours(pages):
            piece = bytes_[run.start * size : run.stop * size]
            found.append(Transfer(self._file, self._cache.disk_offset(layer, pages[run.start]), piece, len(piece)))
        return found

    def gather(self, layer: int, which: int, index: DiskIndex, raw: torch.Tensor, out: torch.Tensor) -> None:
        """Past K (``which`` 0) or V (1) of the disk rows into ``out`` ``[tokens, G, w]``, in row order."""
        full = raw[:, which].flatten(0, 1)
        tails = self._cache.tail[layer, which].flatten(0, 1).index_select(0, index.tail_slots)
        torch.index_select(torch.cat([full, tails]), 0, index.order, out=out)

    def store(self, layer: int, index: DiskIndex, k: torch.Tensor, v: torch.Tensor) -> None:
        """Assemble the touched pages from the tails and the new tokens, and put what is not full back into tails."""
        side = self._stored % 2
        self._stored += 1
        if (pending := self._writing[side]) is not None:
            pending.wait()
            self._writing[side] = None
        index.sides[layer] = side
        pages = self._pages(self._write_buffers[side])
        (begun, begun_tails), (left, left_tails) = index.begun, index.left
        for which, new in enumerate((k, v)):
            tail = self._cache.tail[layer, which]
            pages[:, which].index_copy_(0, begun, tail.index_select(0, begun_tails))
            pages[:, which].index_put_(index.new_slots, new)
            tail.index_copy_(0, left_tails, pages[:, which].index_select(0, left))

    def write(self, layer: int, index: DiskIndex) -> None:
        """Start writing the pages that are full; `drain` or the buffer's next use waits for them."""
        side = index.sides.pop(layer)
        size = self._cache.disk_page_bytes
        bytes_ = self._write_buffers[side].numpy().data
        transfers = []
        for at, page in index.filled:
            piece = bytes_[at * size : (at + 1) * size]
            transfers.append(Transfer(self._file, self._cache.disk_offset(layer, page), piece, size))
        self._writing[side] = self._writer.submit(transfers, f"kv {layer}")

    def drain(self) -> None:
        """Wait for the writes under way."""
        for pending in self._writing:
            if pending is not None:
                pending.wait()

    def close(self) -> None:
        """End the threads."""
        self._reader.close()
        self._writer.close()

    def _pages(self, buffer: torch.Tensor) -> torch.Tensor:
        """All pages that a buffer holds, ``[pages, 2, page_tokens, G, w]``."""
        cache, size = self._cache, self._cache.disk_page_bytes
        pages = buffer[: len(buffer) // size * size].view(-1, size)[:, : cache.page_bytes]
        elements = pages.view(cache.shape.stored_dtype)
        shaped: torch.Tensor = elements.unflatten(1, (2, cache.page_tokens, *cache.shape.stored_token))
        return shaped
