"""Drives the KV cache and its lanes as the executor does, beside rows of plain tensors that tell what must come out."""

from dataclasses import replace

import torch

from cost_model.model.arch import LayerGroup
from flexmoe.formats.packed_kv import is_packed, unpack
from flexmoe.kv.batch import Block, Run
from flexmoe.kv.cache import KVCache, KVShape
from flexmoe.kv.transfers import KVBuffers, KVLanes
from flexmoe.system.device import Device
from flexmoe.system.trace import Recorder
from flexmoe.system.uploads import Uploads
from policies.admission.row_state import AttentionMode

LAYERS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8
SHAPE = KVShape(layers=LAYERS, kv_heads=KV_HEADS, head_dim=SIZE, dtype=torch.float32)
MODE = {
    "gpu": AttentionMode.GPU,
    "cpu": AttentionMode.CPU,
    "fetch": AttentionMode.FETCH,
    "disk": AttentionMode.FETCH,
}
TIER = {"gpu": "gpu", "cpu": "cpu", "fetch": "cpu", "disk": "disk"}


class History:
    """A row in the cache and the K and V that it was given: ``k[layer]`` is ``[tokens, G, Dh]``."""

    def __init__(self, kind, kv):
        self.kind, self.kv = kind, kv
        self.k, self.v = ([torch.zeros(0, KV_HEADS, SIZE) for _ in range(LAYERS)] for _ in range(2))

    def truncate(self, length):
        self.k, self.v = ([x[:length] for x in side] for side in (self.k, self.v))


class Bench:
    """A cache of ``pages`` per tier with its lanes; `sweep` runs one sweep over some rows and checks its attention."""

    def __init__(
        self,
        directory,
        pages,
        *,
        window=None,
        groups=(),
        seed=0,
        tails=8,
        batch_rows=3,
        device=None,
        compressed=False,
        staging_pages=None,
        write_pages=60,
    ):
        self.recorder, self.batch_rows = Recorder(), batch_rows
        device = device or Device("cpu")
        counts = dict(zip(("gpu", "cpu", "disk"), pages))
        self.uploads = Uploads(device)
        groups = groups or (LayerGroup(window, tuple(range(LAYERS))),)
        shape = replace(SHAPE, groups=groups, compressed=compressed)
        self.cache = KVCache(device, shape, counts, tails if counts["disk"] else 0, directory)
        buffers = KVBuffers(staging_pages=staging_pages or sum(pages), batch_tokens=600, write_pages=write_pages)
        self.lanes = KVLanes(device, self.recorder, self.cache, buffers, HEADS)
        self.generator = torch.Generator().manual_seed(seed)

    def open(self, kind):
        return History(kind, self.cache.open(TIER[kind]))

    def fork(self, row):
        twin = History(row.kind, self.cache.fork(row.kv))
        twin.k, twin.v = list(row.k), list(row.v)
        return twin

    def copy(self, row, pages, kind, begun=None):
        """Copy pages of the row that are shared to another tier; returns them, and a row that begins after them there."""
        target, copy = self.cache.copy_shared(pages, TIER[kind], begun)
        self.lanes.copy([copy])
        twin = History(kind, self.cache.fork(target))
        twin.k, twin.v = ([x[: pages.length] for x in side] for side in (row.k, row.v))
        return target, twin

    def close(self):
        self.lanes.close()
        self.cache.close_file()

    def moved(self, lane):
        """Bytes of a lane so far."""
        totals = self.recorder.totals().get(lane)
        return totals.nbytes if totals else 0

    def sweep(self, rows, lengths):
        """Every row takes ``lengths`` new tokens of random K and V; raises unless attention over all is right."""
        runs = []
        for row, count in zip(rows, lengths):
            self.cache.reserve(row.kv, count)
            runs.append(Run(row.kv, [0] * count, MODE[row.kind], 1, row))
        block = Block(runs, self.batch_rows)
        self.lanes.begin(block, self.uploads)
        for layer in range(LAYERS):
            self._layer(layer, block)
        self.lanes.drain()
        for run in block.runs:
            self.cache.advance(run.kv, run.kv.length + len(run.tokens))

    def _layer(self, layer, block):
        """The executor's order: batch j + 1 is loaded and stored before batch j is attended."""
        ahead = [self._project(layer, block.batches[0])]
        for j, batch in enumerate(block.batches):
            if j + 1 < len(block.batches):
                ahead.append(self._project(layer, block.batches[j + 1]))
            self._check(layer, batch, *ahead[j])

    def _project(self, layer, batch):
        modes = [g.mode for g in batch.groups]
        loaded = self.lanes.load(layer, batch) if AttentionMode.FETCH in modes else None
        tokens = batch.stop - batch.start
        q = torch.randn(tokens, HEADS, SIZE, generator=self.generator)
        k, v = (torch.randn(tokens, KV_HEADS, SIZE, generator=self.generator) for _ in range(2))
        if (new := self.lanes.new_kv(layer, batch)) is not None:
            new.put(k, v)
        k, v = (self.cache.shape.as_stored(x) for x in (k, v))
        on_disk = any(run.kv.tier == "disk" for g in batch.groups for run in g.runs)
        after = [loaded] if on_disk else []
        stored = self.lanes.store(layer, batch, q, k, v, after) if set(modes) - {AttentionMode.GPU} else None
        if on_disk:
            self.lanes.write(layer, batch)
        attended = self.lanes.cpu_attend(layer, batch, stored) if AttentionMode.CPU in modes else None
        return q, k, v, loaded, attended

    def _check(self, layer, batch, q, k, v, loaded, attended):
        self.lanes.settle(batch)
        for group in batch.groups:
            if group.mode is AttentionMode.GPU:
                out = self.lanes.attend_gpu(layer, batch, q)
            elif group.mode is AttentionMode.FETCH:
                out = self.lanes.attend_fetched(layer, batch, q, k, v, loaded.result())
            else:
                out = attended.result().tensor
            start = group.start
            for run in group.runs:
                here = slice(start, start + len(run.tokens))
                row = run.owner
                row.k[layer] = torch.cat([row.k[layer], self._values(k[here])])
                row.v[layer] = torch.cat([row.v[layer], self._values(v[here])])
                expected = self._attend(layer, q[here], row.k[layer], row.v[layer])
                got = out[start - group.start : start - group.start + len(run.tokens)]
                torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
                start = here.stop

    def _values(self, stored):
        """Of keys or values as the cache stores them."""
        return unpack(stored, torch.empty(*stored.shape[:-1], SIZE)) if is_packed(stored) else stored

    def _attend(self, layer, q, k, v):
        window = self.cache.window_of(layer)
        k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * SIZE**-0.5
        position, key = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
