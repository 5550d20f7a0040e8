"""The engine: submit requests, step sweep by sweep, collect what finishes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cost_model.sizes import BLOCK_TOKENS
from cost_model.units import experts_of
from flexmoe.activations import Activations
from flexmoe.block import Block, Run
from flexmoe.device import keep_freed_memory
from flexmoe.errors import StorageError, UsageError
from flexmoe.executor import Executor, Units
from flexmoe.kv_cache import KVCache, KVShape
from flexmoe.kv_lanes import KVBuffers, KVLanes
from flexmoe.loader import Model
from flexmoe.params import CompletionOutput, EngineRequest, RequestOutput
from flexmoe.planning import GIB, EngineConfig, EnginePlan
from flexmoe.scheduler import Row, Scheduler
from flexmoe.stream import WeightStream
from flexmoe.trace import Recorder
from flexmoe.weights import EmbeddingTable, WeightStore
from policies.schedule import SweepShape, UnitStep, experts_in_compute_order, fetch_order

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What one sweep did."""

    wall_s: float
    rows: int
    tokens: int
    prompt_tokens: int
    generated_tokens: int


class Engine:
    """Runs requests in rolling blocks under a policy.

    Args:
        model: from `loader.load_model`.
        config: how to run it.

    Raises:
        UsageError: no such device or dtype.
        InfeasibleError: the policy needs more bytes than a tier has; raised before anything is loaded.
        StorageError: the offload directory cannot be written.
    """

    def __init__(self, model: Model, config: EngineConfig):
        self.config, self.model = config, model.grouped(config.policy.experts_per_unit)
        self.plan = EnginePlan.of(self.model, config)
        self.device = self.plan.device
        log.info("%s", self.plan.describe_weights())
        self._parts = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._parts.close()
            raise
        self.sweeps: list[Sweep] = []
        self._closed = False

    def check(self, request: EngineRequest) -> str | None:
        """Why a request can never run, as a sentence; None if it can."""
        arch, prompt = self.model.arch, request.prompt_token_ids
        if not prompt:
            return "the prompt has no tokens"
        wrong = next((t for t in prompt if not 0 <= t < arch.vocab_size), None)
        if wrong is not None:
            return f"token id {wrong} is outside the vocabulary of {arch.vocab_size}"
        if len(prompt) >= arch.max_position:
            return f"the prompt has {len(prompt)} tokens; the model's context of {arch.max_position} leaves no room for one more"
        if self._limit(request) - 1 > self._largest_row:
            return (
                f"prompt and completion may reach {self._limit(request)} tokens, but the KV cache and its buffers were "
                f"planned for at most {self._largest_row} in one row"
            )
        return None

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            UsageError: it can never run (`check`).
        """
        problem = self.check(request)
        if problem is not None:
            raise UsageError(f"request {request.request_id}: {problem}")
        self.scheduler.waiting.append(Row(request, list(request.prompt_token_ids), self._limit(request)))

    def enter_aged(self, request: EngineRequest, generated: Sequence[int]) -> None:
        """Put a request in flight as if ``generated`` had been generated, with KV that nobody computed (benchmarks).

        Raises:
            UsageError: it can never run, or would have ended already.
            KVExhausted: no tier has room for it.
        """
        problem, limit = self.check(request), self._limit(request)
        tokens = [*request.prompt_token_ids, *generated]
        if problem is None and not len(request.prompt_token_ids) < len(tokens) < limit:
            problem = f"it has {len(generated)} generated tokens; an aged row has at least 1, and one left to generate"
        if problem is not None:
            raise UsageError(f"request {request.request_id}: {problem}")
        self.scheduler.enter_aged(Row(request, tokens, limit))

    @property
    def unfinished(self) -> int:
        """Requests waiting or in flight."""
        return self.scheduler.unfinished

    def step(self) -> list[RequestOutput]:
        """Run one sweep.

        Returns:
            list[RequestOutput]: the requests that finished in it.

        Raises:
            StorageError: a disk transfer failed.
        """
        if self._closed:
            raise UsageError("this engine is closed; make a new one")
        start = time.perf_counter()
        runs = self.scheduler.plan()
        if not runs:
            if self.unfinished:  # `check` admits only rows that fit an empty tier, so this cannot be waited out
                raise RuntimeError(f"{self.unfinished} requests wait, but the scheduler can admit none of them")
            return []
        block = Block(runs, self.config.policy.gpu_batch_size)
        logits = self.executor.run(block)
        chosen = dict(zip(block.logit_owners, self._choose(logits)))
        prompt = sum(self.scheduler.commit(run.owner, chosen.get(run.owner)) for run in block.runs)
        finished = self._end_sweep(chosen)
        self.sweeps.append(
            Sweep(
                wall_s=time.perf_counter() - start,
                rows=len(runs),
                tokens=block.tokens,
                prompt_tokens=prompt,
                generated_tokens=len(block.logit_owners),
            )
        )
        return finished

    def abort(self, request_id: str) -> bool:
        """Drop a request that waits or is in flight; its place and KV are free for the next sweep."""
        for row in self.scheduler.running:
            if row.request.request_id == request_id:
                self.scheduler.finish(row)
                return True
        for row in self.scheduler.waiting:
            if row.request.request_id == request_id:
                self.scheduler.waiting.remove(row)
                return True
        return False

    def clear(self) -> None:
        """Drop every request."""
        self.scheduler.waiting.clear()
        for row in self.scheduler.running:
            self.scheduler.finish(row)

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits after every token of one sequence, by the same path that generates.

        Returns:
            torch.Tensor: float32 ``[len(token_ids), vocab]`` on the host.

        Raises:
            UsageError: the sequence is longer than a row may be.
        """
        if len(token_ids) > self._largest_row:
            raise UsageError(
                f"{len(token_ids)} tokens are more than the {self._largest_row} that one row may have here"
            )
        tier = max(("gpu", "cpu", "disk"), key=self.cache.total)
        kv = self.cache.open(tier)
        try:
            pieces, step = [], self.config.policy.prefill_tokens
            for i in range(0, len(token_ids), step):
                tokens = token_ids[i : i + step]
                self.cache.reserve(kv, len(tokens))
                mode = "gpu" if tier == "gpu" else "fetch" if self.plan.sizes.fetch_blocks else "cpu"
                pieces.append(
                    self.executor.run(Block([Run(kv, tokens, mode, len(tokens), row_tokens=len(token_ids))], 1))
                    .float()
                    .cpu()
                )
                kv.length += len(tokens)
            return torch.cat(pieces)
        finally:
            self.cache.close(kv)

    def close(self) -> None:
        """Stop the threads and close the files; a second call does nothing."""
        self._closed = True
        self._parts.close()

    def _limit(self, request: EngineRequest) -> int:
        wanted = request.params.max_tokens or self.config.gen_len
        return min(len(request.prompt_token_ids) + wanted, self.model.arch.max_position)

    def _choose(self, logits: torch.Tensor) -> list[int]:
        """Greedy choice; the sweep's last host wait."""
        return logits.argmax(dim=-1).tolist()

    def _end_sweep(self, advanced: Iterable[Row]) -> list[RequestOutput]:
        """Let go of the rows that have ended among those that got a token."""
        done = [(row, reason) for row in advanced if (reason := self._finish_reason(row)) is not None]
        for row, _ in done:
            self.scheduler.finish(row)
        self.scheduler.end_sweep()
        return [_output(row, reason) for row, reason in done]

    def _finish_reason(self, row: Row) -> str | None:
        params, token = row.request.params, row.tokens[-1]
        if token in params.stop_token_ids or (not params.ignore_eos and token in self.config.eos_ids):
            return "stop"
        return "length" if len(row.tokens) >= row.limit else None

    def _build(self) -> None:
        c, policy, arch, counts = self.config, self.config.policy, self.model.arch, self.plan.sizes
        dtype = self.plan.dtype
        keep_freed_memory()
        if self.plan.written_bytes:
            _make_directory(c.offload_dir)
        if c.gpu_mem is not None:
            self.device.cap_memory(int(c.gpu_mem * GIB))
        self.recorder = Recorder(c.keep_spans)
        source = self.model.source(c.offload_dir)
        tier_of = counts.placement.tier_of
        self.store = WeightStore(self.device, self.recorder, source, tier_of, dtype, policy.pin_weight)
        self._parts.callback(self.store.close)
        self.recorder.reset_totals()  # a run's rates do not count what loading moved
        units = _units(self.model, tier_of)
        shape = SweepShape(
            attention=units.attention, experts=units.experts, head=units.head, activation_tiers=counts.activation_tiers
        )
        self.stream = WeightStream(
            self.store, fetch_order(shape), counts.slots, counts.staging_slots, overlap=policy.overlap
        )
        kv_shape = KVShape(layers=arch.num_layers, kv_heads=arch.num_kv_heads, head_dim=arch.head_dim, dtype=dtype)
        self._parts.callback(self.stream.close)
        self.cache = KVCache(self.device, kv_shape, counts.kv_blocks, counts.tails, c.offload_dir)
        buffers = KVBuffers(
            staging_blocks=counts.fetch_blocks, batch_tokens=counts.batch_tokens, write_blocks=counts.write_blocks
        )
        self.kv = KVLanes(self.device, self.recorder, self.cache, buffers, arch.num_heads, arch.sliding_window)
        self._parts.callback(self.kv.close)
        self.activations = Activations(
            self.device,
            self.recorder,
            counts.activation_tiers,
            counts.batch_tokens,
            arch.hidden,
            dtype,
            c.offload_dir,
        )
        self._parts.callback(self.activations.close)
        self.scheduler = Scheduler(policy, self.cache, recompute_past=counts.recompute_past)
        self._largest_row = self.scheduler.largest_row_tokens()
        if counts.fetch_blocks and c.longest_row:  # the buffers of fetched KV are made for rows of this length
            self._largest_row = min(self._largest_row, -(-c.longest_row // BLOCK_TOKENS) * BLOCK_TOKENS)
        self.executor = Executor(
            device=self.device,
            recorder=self.recorder,
            family=self.model.family,
            units=units,
            stream=self.stream,
            embed=EmbeddingTable(self.store, source, "embed", counts.max_tokens),
            kv=self.kv,
            activations=self.activations,
            activation_tiers=counts.activation_tiers,
            max_tokens=counts.max_tokens,
            dtype=dtype,
            overlap=policy.overlap,
        )


def _units(model: Model, tier_of: Mapping[str, str]) -> Units:
    arch = model.arch
    attention, experts, head, index, rows = [], [[] for _ in range(arch.num_layers)], [], {}, {}
    for unit in arch.units():
        step, number = UnitStep(name=unit.name, tier=tier_of[unit.name]), unit.name.rsplit(".", 1)[-1]
        if unit.kind == "attention":
            attention.append(step)
        elif unit.kind == "expert":
            experts[unit.layer].append(step)
            index[unit.name] = experts_of(unit.name)
        elif unit.kind == "head":
            head.append(step)
            rows[unit.name] = arch.head_rows(int(number))
    ordered = tuple(tuple(experts_in_compute_order(e)) for e in experts)
    return Units(attention=tuple(attention), experts=ordered, head=tuple(head), experts_of=index, head_rows=rows)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"cannot create the offload directory {path}: {e.strerror}") from e


def _output(row: Row, reason: str) -> RequestOutput:
    return RequestOutput(
        request_id=row.request.request_id,
        prompt=None,
        prompt_token_ids=row.request.prompt_token_ids,
        outputs=[CompletionOutput(index=0, text=None, token_ids=tuple(row.generated_ids), finish_reason=reason)],
        finished=True,
    )
