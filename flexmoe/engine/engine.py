"""The engine: submit requests, step sweep by sweep, collect what finishes."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.memory.memory_plan import sampling_bytes
from flexmoe.engine.build import build_parts
from flexmoe.engine.completions import Answer, Rules
from flexmoe.engine.config import EngineConfig, EnginePlan
from flexmoe.engine.length_estimate import Reserve
from flexmoe.engine.request_check import problem
from flexmoe.engine.scheduler import Scheduler
from flexmoe.engine.sweep_log import Sweep, SweepLog
from flexmoe.errors import UsageError
from flexmoe.kv.batch import Block, Run
from flexmoe.models.loader import Model
from flexmoe.params import EngineRequest, InFlight, RequestOutput, Resumed
from flexmoe.sampling.sampler import Chosen, sample
from policies.admission.row_state import AttentionMode

log = logging.getLogger(__name__)


class Engine:
    """Runs requests in rolling blocks under a policy.

    Args:
        model: from `loader.load_model`.
        config: how to run it.
        detokenize: text of token ids, for requests with stop strings.

    Attributes:
        largest_row_tokens: tokens of the longest prompt and completion that the KV cache and its buffers hold.

    Raises:
        UsageError: no such device or dtype.
        InfeasibleError: the policy needs more bytes than a tier has; raised before anything is loaded.
        StorageError: the offload directory cannot be written.
    """

    def __init__(self, model: Model, config: EngineConfig, detokenize: Callable[[Sequence[int]], Any] | None = None):
        self.config, self.model = config, model.grouped(config.policy.experts_per_unit)
        self.plan = EnginePlan.of(self.model, config)
        self._rules = Rules(
            eos_ids=frozenset(config.eos_ids),
            seed=config.seed,
            limit=partial(_limit, default=config.gen_len, context=model.arch.max_position),
            detokenize=detokenize,
            recompute_past=model.arch.rope_switch,
        )
        self.device = self.plan.device
        log.info("%s", self.plan.describe_weights())
        self._closing = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._closing.close()
            raise
        self.sweeps = SweepLog()
        self._answers: dict[Answer, None] = {}
        self._complete: list[RequestOutput] = []
        self._closed = False

    def check(self, request: EngineRequest) -> str | None:
        """Why a request can never run, as a sentence; None if it can."""
        return problem(
            request,
            self.model.arch,
            limit=self.limit(request),
            room=self.largest_row_tokens,
            has_tokenizer=self._rules.detokenize is not None,
        )

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            UsageError: it can never run (`check`).
        """
        reason = self.check(request)
        if reason is not None:
            raise UsageError(f"request {request.request_id}: {reason}")
        answer = Answer(request, self._rules)
        if answer.complete:
            self._complete.append(answer.result())
            return
        self._answers[answer] = None
        self.scheduler.submit(answer.rows)

    def enter_aged(self, request: EngineRequest, generated: Sequence[int]) -> None:
        """Put a request in flight as if ``generated`` had been generated, with KV that nobody computed (benchmarks).

        Raises:
            UsageError: it can never run, or would have ended already.
            KVExhausted: no tier has room for it.
        """
        request = replace(request, resumed=(Resumed(token_ids=tuple(generated)),))
        reason = self.check(request)
        answer = Answer(request, self._rules) if reason is None else None
        if answer and not (generated and answer.rows):
            reason = f"it has {len(generated)} generated tokens; an aged row has at least 1, and one left to generate"
        if reason is not None:
            raise UsageError(f"request {request.request_id}: {reason}")
        self.scheduler.enter_aged(answer.rows[0])
        self._answers[answer] = None

    @property
    def unfinished(self) -> int:
        """Requests waiting, in flight, or complete and not returned yet."""
        return len(self._answers) + len(self._complete)

    @property
    def waiting(self) -> int:
        """Rows that have no place yet, and requests that are complete without one."""
        return self.scheduler.rows_waiting + len(self._complete)

    def in_flight(self) -> list[InFlight]:
        """What the samples of unfinished requests have generated; those without a token are left out."""
        return [state for answer in self._answers for state in answer.in_flight()]

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
            if self._answers:  # `check` admits only rows that fit an empty tier, so this cannot be waited out
                raise RuntimeError(f"{self.unfinished} requests wait, but the scheduler can admit none of them")
            return self._take_complete()
        block = Block(runs, self.config.policy.gpu_batch_size)
        logits = self.executor.run(block)
        chosen = sample(logits, [row.sampler for row in block.logit_owners], workspace_bytes=self._sampling_bytes)
        tokens = dict(zip(block.logit_owners, chosen.tokens))
        prompt = sum(self.scheduler.commit(run.owner, tokens.get(run.owner)) for run in block.runs)
        self._end_sweep(block, chosen)
        self.sweeps.add(
            Sweep(
                wall_s=time.perf_counter() - start,
                rows=len(runs),
                tokens=sum(len(run.tokens) for run in runs),
                computed_tokens=block.tokens,
                prompt_tokens=prompt,
                generated_tokens=len(block.logit_owners),
            )
        )
        return self._take_complete()

    def abort(self, request_id: str) -> bool:
        """Drop a request that waits or is in flight; its places and KV are free for the next sweep."""
        for answer in self._answers:
            if answer.request.request_id == request_id:
                for row in answer.rows:
                    self.scheduler.drop(row)
                del self._answers[answer]
                return True
        return False

    def clear(self) -> None:
        """Drop every request."""
        self.scheduler.clear()
        self._answers.clear()
        self._complete.clear()

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits after every token of one sequence, by the same path that generates.

        Returns:
            torch.Tensor: float32 ``[len(token_ids), vocab]`` on the host.

        Raises:
            UsageError: the sequence is longer than a row may be.
        """
        if len(token_ids) > self.largest_row_tokens:
            raise UsageError(
                f"{len(token_ids)} tokens are more than the {self.largest_row_tokens} that one row may have here"
            )
        tier = max(("gpu", "cpu", "disk"), key=self.cache.total)
        mode = AttentionMode.FETCH if self.plan.sizes.fetch_pages else AttentionMode.CPU
        mode = AttentionMode.GPU if tier == "gpu" else mode
        kv = self.cache.open(tier)
        try:
            pieces, step = [], self.config.policy.prefill_tokens
            for i in range(0, len(token_ids), step):
                tokens = token_ids[i : i + step]
                self.cache.reserve(kv, len(tokens))
                run = Run(kv, tokens, mode, len(tokens), row_tokens=len(token_ids))
                pieces.append(self.executor.run(Block([run], 1)).float().cpu())
                kv.length += len(tokens)
            return torch.cat(pieces)
        finally:
            self.cache.close(kv)

    def close(self) -> None:
        """Stop the threads and close the files; a second call does nothing."""
        self._closed = True
        self._closing.close()

    def limit(self, request: EngineRequest) -> int:
        """Tokens that a request may reach, prompt and completion."""
        return self._rules.limit(request)

    def _end_sweep(self, block: Block, chosen: Chosen) -> None:
        """Give rows what the sweep found for them, and let go of those that have ended."""
        if block.scores is not None:
            found = iter(block.scores.records([run.top for run in block.scored for _ in run.targets]))
            for run in block.scored:
                run.owner.answer.prompt_logprobs += [next(found) for _ in run.targets]
        ended = [run.owner for run in block.runs if run.owner.index < 0 and run.owner.answer.end(run.owner)]
        for row, token, logprob in zip(block.logit_owners, chosen.tokens, chosen.logprobs):
            row.took(token, logprob)
            if row.answer.end(row):
                ended.append(row)
        for row in ended:
            self.scheduler.finish(row)
            self.reserve.ended(row)
            if row.answer.complete and row.answer in self._answers:  # several of its rows may have ended
                del self._answers[row.answer]
                self._complete.append(row.answer.result())
        self.scheduler.end_sweep()

    def _take_complete(self) -> list[RequestOutput]:
        complete, self._complete = self._complete, []
        return complete

    def _build(self) -> None:
        c, counts, parts = self.config, self.plan.sizes, build_parts(self.model, self.config, self.plan, self._closing)
        self.recorder, self.store, self.feed, self.executor = parts.recorder, parts.store, parts.feed, parts.executor
        self.cache, self.kv, self.activations = parts.cache, parts.kv, parts.activations
        self.router_counter = parts.router_counter
        self._sampling_bytes = sampling_bytes(self.model.arch, c.policy)
        # Weak, so that the memory of an engine goes with its last user and does not wait for the garbage collector.
        self.reserve = Reserve(lambda: scheduler().running)
        expected_end = self.reserve.expected_end if c.reserve == "p95" else None
        self.scheduler = Scheduler(c.policy, self.cache, expected_end, counts.recompute_past)
        scheduler = weakref.ref(self.scheduler)
        self.largest_row_tokens = self.scheduler.largest_row_tokens()
        if counts.fetch_pages and c.longest_row:  # the buffers of fetched KV are made for rows of this length
            longest = -(-c.longest_row // PAGE_TOKENS) * PAGE_TOKENS
            self.largest_row_tokens = min(self.largest_row_tokens, longest)


def _limit(request: EngineRequest, *, default: int, context: int) -> int:
    wanted = default if request.params.max_tokens is None else request.params.max_tokens
    return min(len(request.prompt_token_ids) + wanted, context)
