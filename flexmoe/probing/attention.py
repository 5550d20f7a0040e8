"""Attention over a paged KV cache: bytes/s of rows that decode, FLOP/s of prompts, by the kernel that serves the tier.

Legend: T query tokens, H query heads, G KV heads, Dh head size.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.kernels.paged_attention import paged_attention
from flexmoe.kernels.ragged import Ragged
from flexmoe.kv.cache import KVShape
from flexmoe.probing.effort import Effort
from flexmoe.probing.timing import fill_with_noise, repeat_s
from flexmoe.system.device import Device

#: (H, G, Dh): grouped 4 to 1, with the two common head sizes.
_HEADS = ((32, 8, 128), (16, 4, 64))
_LAYERS = 2
_PREFILL_ROWS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRates:
    """``bytes_per_s`` of KV read by so many ``rows`` that decode, ``flops_per_s`` of prompts; ``int8``: what the same rows take
    over compressed KV, as a part of what they take over KV of the dtype."""

    bytes_per_s: float
    flops_per_s: float
    int8: float
    rows: int


class AttentionCase:
    """Rows of given runs and contexts, their blocks in no order, over a few layers in turn.

    Args:
        device: compute device.
        on_host: KV and queries lie in host memory, even on CUDA.
        dtype: of the KV.
        heads: (H, G, Dh).
        runs: query tokens of each row.
        contexts: tokens of each row in the cache, its run included.
        compressed: the KV is stored as int8.
    """

    def __init__(
        self,
        device: Device,
        on_host: bool,
        dtype: torch.dtype,
        heads: tuple[int, int, int],
        runs: list[int],
        contexts: list[int],
        *,
        compressed: bool = False,
    ):
        query_heads, kv_heads, size = heads
        per_row = [-(-n // PAGE_TOKENS) for n in contexts]
        kv = KVShape(layers=_LAYERS, kv_heads=kv_heads, head_dim=size, dtype=dtype, compressed=compressed)
        shape = (_LAYERS, 2, sum(per_row), PAGE_TOKENS, *kv.stored_token)
        count = torch.Size(shape).numel()
        self._here = on_host or not device.is_cuda
        if self._here:
            nbytes = count * kv.stored_dtype.itemsize
            pools = device.host_buffer(nbytes)[:nbytes].view(kv.stored_dtype)
        else:
            pools = torch.empty(count, dtype=kv.stored_dtype, device=device.torch)
        if compressed:  # the bytes of a page are those of any other
            page = kv.as_stored(torch.randn(PAGE_TOKENS, kv_heads, size).to(pools.device, dtype))
            pools.view(-1, page.numel()).copy_(page.flatten())
        else:
            fill_with_noise(pools)
        self._layers = itertools.cycle(pools.view(shape))
        ids = torch.randperm(sum(per_row), generator=torch.Generator().manual_seed(0)).split(per_row)
        self._ragged = Ragged.of(runs, contexts, [table.tolist() for table in ids])
        self._q_THd = torch.randn(sum(runs), query_heads, size).to(dtype).to(pools.device)
        self.kv_bytes = sum(contexts) * kv.token_bytes
        # A query attends to what was there before its run and, on average, to half of the run.
        self.flops = sum(4 * query_heads * size * q * (n - q + q / 2) for q, n in zip(runs, contexts, strict=True))
        self._clock = Device("cpu") if self._here else device

    def seconds(self, seconds: float) -> float:
        """Of one call, measured for about ``seconds``."""
        with torch.inference_mode():
            return repeat_s(self._clock, self.attend, seconds, warm=_LAYERS)

    def attend(self) -> None:
        """One call, over the next layer."""
        k_pool, v_pool = next(self._layers)
        paged_attention(self._q_THd, k_pool, v_pool, self._ragged, window=None)


def attention_rates(device: Device, dtype: torch.dtype, effort: Effort, *, on_host: bool) -> AttentionRates:
    """Both rates, over head sizes of 64 and 128: all bytes, or FLOPs, over all seconds."""
    first, last = effort.contexts
    rng, rows = random.Random(0), decode_rows(dtype, effort)
    decoding, prefilling = [], []
    for heads in _HEADS:
        contexts = [rng.randint(first, last) for _ in range(rows)]
        decoding.append((device, on_host, dtype, heads, [1] * rows, contexts))
        # Whole prompts, and second chunks of prompts of twice that length.
        prefilling += [
            (device, on_host, dtype, heads, [q] * _PREFILL_ROWS, [chunks * q] * _PREFILL_ROWS)
            for q in effort.prompts
            for chunks in (1, 2)
        ]
    plain, compressed = (_measured(decoding, effort, compressed=each) for each in (False, True))
    prompts = _measured(prefilling, effort)
    return AttentionRates(
        bytes_per_s=plain.kv_bytes / plain.seconds,
        flops_per_s=prompts.flops / prompts.seconds,
        int8=compressed.seconds / plain.seconds,
        rows=rows,
    )


def decode_rows(dtype: torch.dtype, effort: Effort) -> int:
    """Rows of a decode call: what the effort asks for, if their KV fits into half of its buffers."""
    _, kv_heads, size = _HEADS[0]
    row_bytes = _LAYERS * 2 * kv_heads * size * dtype.itemsize * (sum(effort.contexts) // 2 + PAGE_TOKENS)
    return max(1, min(effort.decode_rows, effort.buffer_bytes // 2 // row_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """KV bytes, FLOPs and seconds of one call of each of some cases."""

    kv_bytes: float
    flops: float
    seconds: float


def _measured(cases: list[tuple[Any, ...]], effort: Effort, *, compressed: bool = False) -> _Measured:
    """The cases, one after the other."""
    kv_bytes, flops, seconds = 0.0, 0.0, 0.0
    for arguments in cases:
        case = AttentionCase(*arguments, compressed=compressed)
        kv_bytes, flops = kv_bytes + case.kv_bytes, flops + case.flops
        seconds += case.seconds(3 * effort.point_s / len(cases))
    return _Measured(kv_bytes=kv_bytes, flops=flops, seconds=seconds)
