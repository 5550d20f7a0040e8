"""Bytes/s at which the KV lanes bring past KV to the device and take new KV home, driven as the executor drives them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from cost_model.memory.allocation import PAGE_TOKENS
from flexmoe.kv.batch import Batch, Block, Run
from flexmoe.kv.cache import KVCache, KVShape, RowKV
from flexmoe.kv.transfers import KVBuffers, KVLanes
from flexmoe.probing.buffers import fill_with_noise, noise
from flexmoe.probing.effort import Effort
from flexmoe.probing.timing import repeat_s
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from policies.admission.row_state import AttentionMode

_QUERY_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128  # Mixtral's
_LAYERS = 4
#: A prompt's run in the stores: every row stores so many tokens.
_STORED_TOKENS = 64


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
        self._lanes = KVLanes(device, Recorder(), self._cache, buffers, _QUERY_HEADS, None)
        self._batch = self._plan(contexts)
        self._past_bytes, self._new_bytes = (n * self._shape.token_bytes for n in (sum(contexts), new_tokens))
        q = noise(device, dtype, new_tokens, _QUERY_HEADS, _HEAD_DIM)
        self._new = q, *(noise(device, dtype, new_tokens, _KV_HEADS, _HEAD_DIM) for _ in range(2))
        self._layer = 0

    def rates(self, seconds: float) -> KVRates:
        """Measure both, for about ``seconds`` each."""
        with torch.inference_mode():
            load_s = self._each_s(self._load, seconds)
            store_s = self._each_s(self._store, seconds)
        return KVRates(
            load=self._past_bytes / load_s, store=self._new_bytes / store_s, rows=len(self._batch.groups[0].runs)
        )

    def close(self) -> None:
        """End the lanes' threads."""
        self._lanes.close()

    def _each_s(self, work, seconds: float) -> float:
        """A lane hands over results when they have arrived, so the host's clock is right on CUDA too."""
        return repeat_s(self._device, work, seconds, warm=_LAYERS)

    def _load(self) -> None:
        self._lanes.load(self._next_layer(), self._batch).result()

    def _store(self) -> None:
        self._lanes.store(self._next_layer(), self._batch, *self._new, None).result()
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
            row = RowKV("cpu", [ids.pop() for _ in range(blocks)], past)
            runs.append(Run(row, [0] * _STORED_TOKENS, AttentionMode.FETCH, 1))
        block = Block(runs, len(runs))
        self._lanes.begin(block)
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
