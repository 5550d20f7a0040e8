"""Ragged KV cache: blocks of a fixed number of tokens in three tiers, a block table per row, reference counts.

A pool holds, per layer, K and V of its blocks: ``[L, 2, blocks, block_tokens, G, Dh]``. A row lives in one tier. On the
disk tier only full blocks are on disk; the growing tail block of a row stays in host memory. This file knows
where bytes live; `kv_lanes` moves them.

Legend: L layers, G KV heads, Dh head size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.system.device import Device
from flexmoe.system.direct_io import DirectFile


def token_slots(blocks: np.ndarray, tokens: np.ndarray, block_tokens: int) -> np.ndarray:
    """Flat pool slots of a row's ``tokens`` (positions) under its block table."""
    return blocks[tokens // block_tokens] * block_tokens + tokens % block_tokens


class KVExhausted(Exception):
    """A tier has no free block left: the scheduler sends a row back."""


class BlockAllocator:
    """Hands out block ids of one tier and counts who shares them.

    A row's blocks are neighbours as far as that goes: neighbours on disk are read at once.
    """

    def __init__(self, blocks: int):
        self.total = blocks
        self._free = dict.fromkeys(range(blocks - 1, -1, -1))
        self._references = [0] * blocks

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, after: int = -1) -> int:
        """A free block, held once: the one that follows ``after`` if it is free, else the one that was freed last.

        Raises:
            KVExhausted: there is none.
        """
        if not self._free:
            raise KVExhausted
        if after + 1 in self._free and after >= 0:
            block = after + 1
            del self._free[block]
        else:
            block, _ = self._free.popitem()
        self._references[block] = 1
        return block

    def share(self, block: int) -> int:
        """Hold a block once more."""
        self._references[block] += 1
        return block

    def is_shared(self, block: int) -> bool:
        """Whether a block is held more than once: then nobody may write into it."""
        return self._references[block] > 1

    def drop(self, block: int) -> None:
        """Give up one hold; the last one frees the block."""
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None


@dataclass(slots=True)
class RowKV:
    """The cache of one row: its tier, its block table and how many tokens are stored.

    ``tail`` is the host slot of a disk row's growing block, -1 elsewhere.
    """

    tier: str
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    tail: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What a token's KV looks like."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """The three pools and the rows in them.

    Args:
        device: compute device; the ``gpu`` pool lives there.
        shape: layers, heads, dtype.
        blocks: blocks per tier.
        tails: rows that the disk tier can hold at once (one host block each).
        offload_dir: directory of the disk tier's file.
        block_tokens: tokens per block.
    """

    def __init__(
        self,
        device: Device,
        shape: KVShape,
        blocks: dict[str, int],
        tails: int = 0,
        offload_dir: Path | None = None,
        block_tokens: int = PAGE_TOKENS,
    ):
        self.shape, self.block_tokens = shape, block_tokens
        self._allocators = {tier: BlockAllocator(n) for tier, n in blocks.items()}
        self._tails = BlockAllocator(tails)
        self.block_bytes = shape.token_bytes * block_tokens
        self.gpu = self._pool(device, blocks["gpu"], on_device=True)
        self.cpu = self._pool(device, blocks["cpu"], on_device=False)
        self.tail = self._pool(device, tails, on_device=False)
        self.file: DirectFile | None = None
        if blocks["disk"]:
            path = Path(offload_dir or ".") / f"kv-{os.getpid()}-{id(self)}.bin"
            self.file = DirectFile(path, writable=True)
            os.unlink(path)  # the descriptor keeps it; a killed run leaves nothing behind

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens of one row."""
        return -(-tokens // self.block_tokens)

    def total(self, tier: str) -> int:
        """Blocks of a tier."""
        return self._allocators[tier].total

    def free(self, tier: str) -> int:
        """Blocks of a tier that no row holds."""
        return self._allocators[tier].free

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
            KVExhausted: its tier has too few free blocks.
        """
        allocator = self._allocators[row.tier]
        missing = self.blocks_for(row.length + tokens) - len(row.blocks)
        if missing > allocator.free:
            raise KVExhausted
        for _ in range(missing):
            row.blocks.append(allocator.take(after=row.blocks[-1] if row.blocks else -1))

    def truncate(self, row: RowKV, length: int) -> None:
        """Forget the tokens from ``length`` on and free the blocks that only they needed.

        Raises:
            ValueError: the row has fewer tokens; or it would go on writing into a block that it shares or, on disk,
                that has been written already.
        """
        if not 0 <= length <= row.length:
            raise ValueError(f"cannot truncate a row of {row.length} tokens to {length}")
        keep = self.blocks_for(length)
        if row.tier == "disk" and length % self.block_tokens and keep < self.blocks_for(row.length + 1):
            raise ValueError("a disk row can only be cut inside its tail or at a block boundary")
        allocator = self._allocators[row.tier]
        if length % self.block_tokens and allocator.is_shared(row.blocks[keep - 1]):
            raise ValueError("a row cannot be cut inside a block that is shared with another row")
        for block in reversed(row.blocks[keep:]):  # the next row then begins where this one did
            allocator.drop(block)
        del row.blocks[keep:]
        row.length = length

    def close(self, row: RowKV) -> None:
        """Free everything the row holds."""
        self.truncate(row, 0)
        if row.tail >= 0:
            self._tails.drop(row.tail)
            row.tail = -1

    def fork(self, row: RowKV) -> RowKV:
        """A second row with the same tokens: full blocks are shared, the growing one is copied.

        Raises:
            KVExhausted: no block is free for the copy.
        """
        allocator = self._allocators[row.tier]
        full = row.length // self.block_tokens
        grows = self.blocks_for(row.length) > full
        if grows and not allocator.free:
            raise KVExhausted
        twin = self.open(row.tier)
        twin.blocks = [allocator.share(b) for b in row.blocks[:full]]
        twin.length = row.length
        if grows:
            twin.blocks.append(allocator.take())
            pool = {"gpu": self.gpu, "cpu": self.cpu, "disk": self.tail}[row.tier]
            source = row.tail if row.tier == "disk" else row.blocks[full]
            target = twin.tail if row.tier == "disk" else twin.blocks[full]
            pool[:, :, target] = pool[:, :, source]
        return twin

    def share(self, row: RowKV, tokens: int) -> RowKV:
        """A hold on the row's first ``tokens`` tokens, whole blocks that are filled: rows are forked from it, and the
        blocks stay while it or any of them is open. It takes no block and no tail, and does not grow."""
        allocator = self._allocators[row.tier]
        blocks = [allocator.share(b) for b in row.blocks[: tokens // self.block_tokens]]
        return RowKV(row.tier, blocks=blocks, length=len(blocks) * self.block_tokens)

    def disk_offset(self, layer: int, block: int) -> int:
        """Byte offset of a block of a layer in the disk tier's file: a row's neighbouring blocks are neighbours."""
        return (layer * self.total("disk") + block) * self.block_bytes

    def _pool(self, device: Device, blocks: int, *, on_device: bool) -> torch.Tensor:
        s = self.shape
        shape = (s.layers, 2, blocks, self.block_tokens, s.kv_heads, s.head_dim)
        size = s.layers * blocks * self.block_bytes
        if on_device and device.is_cuda:
            return torch.empty(shape, dtype=s.dtype, device=device.torch)
        return device.host_buffer(size)[:size].view(s.dtype).view(shape)
