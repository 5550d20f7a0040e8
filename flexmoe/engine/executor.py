"""Runs one sweep: walks the schedule's operations and hands each to the lane that does it.

`Executor.run` is the loop. `policies.schedule.sweep` gives the operations in issue order, and each kind has a method,
``_op_<kind>``; those are below in the order of a layer. An operation of the GPU is done in this thread. One of another
lane leaves a future; whoever depends on it waits for that future, and on CUDA for the event it carries, never for the
device.

The executor knows no model (that is ``family``), and not where weights, KV and hidden states live.

The residual stream is kept per GPU batch, by the activations; `attend` adds what attention gives. The experts run over the
whole block, or over one of its halves, when a batch may be away in its tier: their output waits in a buffer of the block, and
is added when the next layer (`project`) or the head (`collect`) asks for the batch. Of two half-blocks only one is routed at a
time: its experts are all issued before the other one is. Where the head lives on the device, the caller of `Executor.run` gets the
logits of the first one before the last experts of the second one are issued, so that what chooses its tokens goes there first.

Legend: T tokens of the block, D hidden, E experts, R rows of logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from cost_model.model.weight_units import head_rows
from flexmoe.debugging.watch import Watch
from flexmoe.engine.head import Logits
from flexmoe.engine.hidden_states import Activations
from flexmoe.engine.router_counter import RouterCounter
from flexmoe.kernels.expert_dispatch import ExpertDispatch
from flexmoe.kernels.family import Family
from flexmoe.kv.batch import Arrived, Batch, Block, BlockPart, Group, begun
from flexmoe.kv.transfers import KVLanes
from flexmoe.system.device import Device, Event
from flexmoe.system.trace import Recorder
from flexmoe.system.uploads import Downloads, Uploads
from flexmoe.weights.store import EmbeddingTable
from flexmoe.weights.supply import WeightFeed
from policies.admission.row_state import AttentionMode
from policies.schedule import Op, SweepShape, SweepUnits, halves_of_sweep, sweep
from policies.units import UnitId

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Executor:
    """Executes sweeps.

    Args:
        device, recorder: compute device, and where the times of its work go.
        family: the model's mathematics.
        units: its weight units.
        feed: brings their weights to the device.
        embed: the embedding table.
        kv: moves KV, and attends to it.
        activations: keeps hidden states between the modules.
        router_counter: counts what the routers choose.
        experts: computes those of a layer.
        max_tokens: most tokens of a sweep.
        scored_at_once: positions of prompts that are scored at a time.
        dtype: compute dtype.
        overlap: False runs every operation after the one before it.
        half_blocks: as in `policies.policy.Policy`; blocks are ordered for it.
        watch: sees the operations of every sweep, in debug mode; it has wrapped ``family`` and ``experts`` then.

    Attributes:
        uploads: brings the small arrays of a sweep to the device.
        downloads: brings its tokens to the host.
    """

    def __init__(
        self,
        *,
        device: Device,
        recorder: Recorder,
        family: Family,
        units: SweepUnits,
        feed: WeightFeed,
        embed: EmbeddingTable,
        kv: KVLanes,
        activations: Activations,
        router_counter: RouterCounter,
        experts: ExpertDispatch,
        max_tokens: int,
        scored_at_once: int,
        dtype: torch.dtype,
        overlap: bool,
        half_blocks: int = 1,
        watch: Watch | None = None,
    ):
        self._device, self._recorder, self._family, self._units = device, recorder, family, units
        self.uploads, self.downloads = Uploads(device), Downloads(device)
        self._feed, self._embedding, self._kv, self._hidden = feed, embed, kv, activations
        self._overlap, self._half_blocks, self._router_counter = overlap, half_blocks, router_counter
        arch = family.arch
        self._experts, self._watch = experts, watch
        # Of the whole block, since the experts run over all of it: their inputs, their outputs, the router's logits.
        self._x_TD = torch.empty(max_tokens, arch.hidden, dtype=dtype, device=device.torch)
        self._y_TD = torch.empty(max_tokens, arch.hidden, dtype=dtype, device=device.torch)
        router_dtype = torch.float32 if arch.router_float32 else dtype
        self._router_TE = torch.empty(max_tokens, arch.num_experts, dtype=router_dtype, device=device.torch)
        self._correction_E: torch.Tensor | None = None  # of the layer under way
        self._halves: list[slice] = []  # tokens of the half-blocks of the sweep
        self._parts: list[BlockPart] = []  # of its block
        self._dtype, self._logits = dtype, Logits(device, family, scored_at_once, dtype)
        self._pending: dict[int, Future[Any]] = {}  # by the id of the operation, of lanes other than the GPU
        self._qkv: dict[int, QKV] = {}  # by GPU batch, of the layer under way

    @torch.inference_mode()
    def run(self, block: Block) -> Iterator[tuple[BlockPart, torch.Tensor]]:
        """Advance every row of the block by its run.

        Yields:
            BlockPart, torch.Tensor: logits ``[R, vocab]`` on the compute device, one row per requested position, in block order. The
                targets' log-probabilities are in ``scores`` of the part. With the last part all operations have been issued and
                all new KV is home, though the device may still compute.
        """
        self._device.rebase()
        self._block = block
        self._pending.clear()
        self._qkv.clear()
        shape = self._shape(block)
        self._halves, self._parts = block.halves(shape.first_half), block.parts(shape.first_part)
        self._to_device(block)
        for batch in block.batches:
            batch.rope = self._family.rope(batch.positions_T, batch.lengths_T, self._dtype)
        operations = sweep(shape, overlap=self._overlap)
        if self._watch is not None:
            operations = self._watch.operations(operations, block, self._halves, self._parts)
        *others, last = self._parts
        for op in operations:
            self._issue(op)
            if not self._overlap:
                self._wait(op.id)
            if op.kind == "sample" and op.half < len(others):
                yield others[op.half], self._logits.take()
        self._kv.drain()
        self._feed.end()
        self._recorder.resolve()
        yield last, self._logits.take()

    def _to_device(self, block: Block) -> None:
        """Token ids, places and index tensors of a sweep to the compute device, in one copy."""
        names = ["positions_T", "lengths_T", "logit_rows", "score_rows"]
        names += ["ids_T"] if self._embedding.resident else []
        self.uploads.begin()
        self.downloads.begin()
        of_batches = ((batch, name) for batch in block.batches for name in names)
        self._kv.begin(block, self.uploads, [*of_batches, *((part, "targets") for part in self._parts)])

    def abandon(self) -> None:
        """Wait until the lanes are idle after a sweep that has failed; what it has computed is dropped."""
        for future in self._pending.values():
            with contextlib.suppress(Exception):  # the sweep's own error has been told
                future.result()
        with contextlib.suppress(Exception):
            self._kv.drain()
        self._pending.clear()
        self._qkv.clear()
        self._hidden.clear()

    def _issue(self, op: Op) -> None:
        """Do an operation of the GPU, or hand it to its lane; the lanes wait for each other, not this thread."""
        handler: Callable[[Op], Future[Any] | None] = getattr(self, f"_op_{op.kind}")
        if op.lane != "gpu":
            future = handler(op)
            if future is not None:
                self._pending[op.id] = future
            return
        for dep in op.deps:
            self._wait(dep)
        if op.kind == "attend":
            self._kv.settle(self._batch(op))
        self._await_weights(op)
        if op.kind == "routed":  # times its experts one by one, because between them it waits
            handler(op)
        else:
            with self._timed(f"{op.kind} {op.unit or op.layer}"):
                handler(op)

    def _timed(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._device.timed(self._recorder, "gpu", name)

    def _await_weights(self, op: Op) -> None:
        """Wait for the unit that the operation computes with, outside of the time that counts as compute."""
        unit = self._units.attention[op.layer].unit if op.kind == "project" else op.unit
        if unit:
            self._feed.get(unit)

    def _wait(self, op_id: int) -> None:
        """Wait for an operation of another lane, and let the compute stream wait for the event that it left. Its future is
        forgotten: one of CPU attention holds a tensor on the device, and what has been waited for once needs no second wait."""
        future = self._pending.pop(op_id, None)
        if future is None:
            return
        result: Arrived | Event | None = future.result()
        event = result.event if isinstance(result, Arrived) else result
        if event is not None:
            event.wait(self._device.compute)

    def _shape(self, block: Block) -> SweepShape:
        def having(test: Callable[[Group], bool]) -> frozenset[int]:
            return frozenset(b.index for b in block.batches if any(test(g) for g in b.groups))

        return SweepShape(
            units=self._units,
            activation_tiers=self._hidden.tiers[: len(block.batches)],
            fetched_batches=having(lambda g: g.mode is AttentionMode.FETCH),
            cpu_batches=having(lambda g: g.mode is AttentionMode.CPU),
            stored_batches=having(lambda g: g.mode is not AttentionMode.GPU),
            disk_batches=frozenset(b.index for b in block.batches if b.on_disk),
            on_demand=self._feed.begin(block.tokens),
            half_blocks=self._halves_of(block),
        )

    def _halves_of(self, block: Block) -> int:
        arch = self._family.arch
        return halves_of_sweep(self._half_blocks, self._device.kind, block.tokens * arch.top_k / arch.num_experts)

    def _batch(self, op: Op) -> Batch:
        return self._block.batches[op.batch]

    def _op_read(self, op: Op) -> None:
        """The weight stream has read ahead; without overlap the copy asks for the read too."""

    def _op_copy(self, op: Op) -> None:
        """The weight stream has copied ahead; without overlap it does so now."""
        if not self._overlap:
            self._feed.get(_unit(op))

    def _op_read_routed(self, op: Op) -> None:
        """The copy asks for the read too."""

    def _op_copy_routed(self, op: Op) -> None:
        """Ask for the experts that were routed to."""
        self._feed.request(op.layer)

    def _op_embed(self, op: Op) -> None:
        batch = self._batch(op)
        self._hidden.put(batch.index, self._family.embedded(self._embedding(batch.ids_T, batch.start)))

    def _op_load_act(self, op: Op) -> Future[Event]:
        return self._hidden.load(op.batch)

    def _op_store_act(self, op: Op) -> Future[None]:
        return self._hidden.store(op.batch)

    def _op_load_kv(self, op: Op) -> Future[Event]:
        batch = self._batch(op)
        batch.loaded[op.layer] = future = self._kv.load(op.layer, batch)
        return future

    def _op_project(self, op: Op) -> None:
        batch = self._batch(op)
        if op.layer > 0:
            self._hidden.add(batch.index, self._expert_output(batch))
        weights = self._feed.get(self._units.attention[op.layer].unit)
        new = self._kv.new_kv(op.layer, batch)
        q, k, v = self._family.project(self._hidden[batch.index], weights, batch.rope, new)
        self._qkv[batch.index] = (q, *self._kv.as_stored(batch, k, v))

    def _op_store_kv(self, op: Op) -> Future[None]:
        batch, after = self._batch(op), [self._pending[dep] for dep in op.deps if dep in self._pending]
        return self._kv.store(op.layer, batch, *self._qkv[batch.index], after, self._sinks(op.layer))

    def _op_write_kv(self, op: Op) -> Future[None]:
        return self._kv.write(op.layer, self._batch(op))

    def _op_cpu_attend(self, op: Op) -> Future[Arrived]:
        batch = self._batch(op)
        batch.attended = self._kv.cpu_attend(op.layer, batch, begun(batch.stored))
        return batch.attended

    def _op_attend(self, op: Op) -> None:
        batch = self._batch(op)
        qkv = self._qkv.pop(batch.index)
        pieces = [self._attend_group(op.layer, batch, group.mode, qkv) for group in batch.groups]
        attended = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        unit = self._units.attention[op.layer].unit
        here = slice(batch.start, batch.stop)
        weights = self._feed.get(unit)
        h_TD, x_TD, router_TE = self._family.output(self._hidden[batch.index], attended, weights)
        self._hidden.put(batch.index, h_TD)
        self._x_TD[here] = x_TD
        if router_TE is not None:
            self._router_TE[here] = router_TE
        if any(batch.stop == half.stop for half in self._halves):
            self._correction_E = self._family.router_correction(weights)
        self._release(op)

    def _attend_group(self, layer: int, batch: Batch, mode: AttentionMode, qkv: QKV) -> torch.Tensor:
        if mode is AttentionMode.GPU:
            return self._kv.attend_gpu(layer, batch, qkv[0], self._sinks(layer))
        if mode is AttentionMode.FETCH:
            return self._kv.attend_fetched(
                layer, batch, *qkv, begun(batch.loaded.pop(layer, None)).result(), self._sinks(layer)
            )
        arrived, batch.attended = begun(batch.attended), None  # the output is kept no longer than it is needed
        return self._device.use_here(arrived.result().tensor)

    def _sinks(self, layer: int) -> torch.Tensor | None:
        return self._feed.get(self._units.attention[layer].unit).get("sinks")

    def _expert_output(self, batch: Batch) -> torch.Tensor:
        """What the experts of the layer before gave for a batch, not yet part of its residual stream."""
        return self._y_TD[batch.start : batch.stop]

    def _release(self, op: Op) -> None:
        """Give back the slot of the unit that nothing in the sweep uses any more."""
        if op.releases is not None:
            self._feed.release(op.releases)

    def _op_route(self, op: Op) -> None:
        half = self._halves[op.half]
        tokens = half.stop - half.start
        self._y_TD[half].zero_()
        if self._family.arch.is_dense(op.layer):
            self._experts.route_all(tokens)
            return
        ids_TK, weights_TK = self._family.route(self._router_TE[half], self._correction_E)
        counts = self._experts.route(ids_TK, weights_TK, self._dtype)
        self._feed.routed(op.layer, counts, tokens)
        self._router_counter.add(op.layer, ids_TK, counts)

    def _op_expert(self, op: Op) -> None:
        unit, half = _unit(op), self._halves[op.half]
        weights = self._family.expert_weights(op.layer, self._feed.get(unit))
        self._experts.add_unit(unit.experts, self._x_TD[half], self._y_TD[half], weights, self._family)
        if op.releases is None:
            self._feed.put_aside(unit)
        self._release(op)

    def _op_routed(self, op: Op) -> None:
        """The routed experts of a layer on demand, the cached ones first."""
        x_TD, y_TD = self._x_TD[: self._block.tokens], self._y_TD[: self._block.tokens]
        for tensors in self._feed.experts():
            weights = {expert: self._family.expert_weights(op.layer, own) for expert, own in tensors.items()}
            with self._timed(f"experts {op.layer}.{','.join(map(str, weights))}"):
                self._experts.add_some(weights, x_TD, y_TD, self._family)
            del tensors, weights  # casts are made for the next ones

    def _op_collect(self, op: Op) -> None:
        # The experts are done with their inputs, so the buffer of those takes what may be nearly as large.
        part = self._parts[op.half]
        self._logits.collect(part, self._final_hidden, self._x_TD[part.tokens])
        for batch in part.batches:
            self._hidden.forget(batch.index)

    def _op_head(self, op: Op) -> None:
        unit = _unit(op)
        self._logits.add(head_rows(self._family.arch, unit.first), self._feed.get(unit))
        self._release(op)

    def _final_hidden(self, batch: Batch, places: torch.Tensor) -> torch.Tensor:
        """The residual stream after the last layer's experts, of the wanted tokens only."""
        h_TD = self._hidden[batch.index].index_select(0, places)
        return h_TD.add_(self._expert_output(batch).index_select(0, places))

    def _op_sample(self, op: Op) -> None:
        """The caller of `run` chooses tokens from the logits."""


def _unit(op: Op) -> UnitId:
    if op.unit is None:
        raise ValueError(f"a {op.kind} operation has no weight unit")
    return op.unit
