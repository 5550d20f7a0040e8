"""The engine: submit requests, step sweep by sweep, collect what finishes."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from cost_model.memory.memory_plan import sampling_bytes
from flexmoe.debugging.finite import DAMAGED, NonFiniteError, overflow
from flexmoe.engine.build import EngineParts
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.engine.requests import Detokenizer, RefusedError, RequestRules, RequestState
from flexmoe.engine.sweep_log import Sweep, SweepLog
from flexmoe.errors import InfeasibleError, UsageError
from flexmoe.kv.batch import Block, BlockPart, Run
from flexmoe.models.loader import Model
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest, InFlight, Resumed
from flexmoe.sampling.sampler import NOT_FINITE, Chosen, Sampling
from flexmoe.structured.grammars import Grammars
from flexmoe.structured.masks import MaskMaker
from flexmoe.system.memory_watch import MemoryWatch, lacks_memory
from policies.admission.row_state import AttentionMode
from policies.placement import TIERS
from policies.policy import Policy

log = logging.getLogger(__name__)


class Engine:
    """Runs requests in rolling blocks under a policy.

    Args:
        model: from `loader.load_model`.
        config: how to run it.
        detokenize: text of token ids, without special tokens unless ``skip_special_tokens=False`` is given; None: there are
            no texts and no stop strings.
        grammars: what compiles grammars, called when a request first has one; it raises why there is nothing that does.

    Attributes:
        config: as given.
        model: in the units of the policy.
        plan: what the engine has allocated.
        sweeps: what has been done.

    Raises:
        UsageError: no such device or dtype.
        InfeasibleError: the policy needs more bytes than a tier has, or weights in another format than the model's; raised
            before anything is loaded.
        StorageError: the offload directory cannot be written.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        detokenize: Detokenizer | None = None,
        grammars: Callable[[], Grammars] | None = None,
    ):
        self.config, self.model = config, model.grouped(config.policy.experts_per_unit)
        self.plan = EnginePlan.of(self.model, config)
        _check_format(self.model, config.policy)
        self.device = self.plan.device
        log.info("%s", self.plan.describe_weights())
        self._rules = _rules(self.model, config, self.plan, detokenize, grammars or _no_grammars)
        self._masks = MaskMaker()
        self._sampling_bytes = sampling_bytes(self.model.arch, config.policy)
        self._requests: dict[RequestState, None] = {}
        self._complete: list[RequestOutput] = []
        self._closed = self._warned = False
        self.sweeps = SweepLog()
        with self.device.computing():
            self._parts = parts = EngineParts.build(self.model, config, self.plan)
        self.recorder, self.store, self.feed, self.executor = parts.recorder, parts.store, parts.feed, parts.executor
        self.cache, self.kv, self.activations = parts.cache, parts.kv, parts.activations
        self.router_counter, self.scheduler = parts.router_counter, parts.scheduler
        self._memory = MemoryWatch(self.plan.limit_bytes, self.cache.forget_free, self.scheduler.shrink)

    @property
    def largest_row_tokens(self) -> int:
        """Tokens of the longest prompt and completion that the KV cache and its buffers hold."""
        return self.plan.largest_row_tokens

    def check(self, request: EngineRequest) -> str | None:
        """Why a request can never run, as a sentence; None if it can."""
        return self._rules.refusal(request)

    def submit(self, request: EngineRequest, *, urgent: bool = False) -> None:
        """Queue a request.

        Args:
            urgent: its rows enter the next sweep, before all that are not, where need be in place of some of those.

        Raises:
            RefusedError: it can never run (`check`).
        """
        state = self._admissible(request)
        if state.complete:
            self._complete.append(state.result())
            return
        self._requests[state] = None
        self.scheduler.submit(state.rows, urgent=urgent)

    def enter_aged(self, request: EngineRequest, generated: Sequence[int]) -> None:
        """Put a request in flight as if ``generated`` had been generated, with KV that nobody computed (benchmarks).

        Raises:
            RefusedError: it can never run, or would have ended already.
            KVExhausted: no tier has room for it.
        """
        state = self._admissible(replace(request, resumed=(Resumed(token_ids=tuple(generated)),)))
        if not (generated and state.rows):
            reason = f"it has {len(generated)} generated tokens; an aged row has at least 1, and one left to generate"
            raise RefusedError(request.request_id, reason)
        self.scheduler.enter_aged(state.rows[0])
        self._requests[state] = None

    @property
    def unfinished(self) -> int:
        """Requests waiting, in flight, or complete and not returned yet."""
        return len(self._requests) + len(self._complete)

    @property
    def waiting(self) -> int:
        """Rows that have no place yet, and requests that are complete without one."""
        return self.scheduler.rows_waiting + len(self._complete)

    def in_flight(self, wanted: Callable[[str], bool] | None = None) -> list[InFlight]:
        """What the samples of unfinished requests have generated; those without a token are left out.

        Args:
            wanted: whether a request of this id is of interest; None: all are.
        """
        states = (state for state in self._requests if wanted is None or wanted(state.request.request_id))
        return [sample for state in states for sample in state.in_flight()]

    def rows_in_flight(self) -> Counter[str]:
        """How many rows each request has in flight, by its id; requests without one are left out."""
        return Counter(row.request.request_id for row in self.scheduler.running)

    def step(self) -> list[RequestOutput]:
        """Run one sweep.

        Returns:
            list[RequestOutput]: the requests that finished in it.

        Raises:
            StorageError: a disk transfer failed.
            NonFiniteError: with ``check_finite``, a value that was computed is not finite.
        """
        if self._closed:
            raise UsageError("this engine is closed; make a new one")
        with self.device.computing():
            return self._sweep()

    def _sweep(self) -> list[RequestOutput]:
        start = time.perf_counter()
        self._memory.check()
        runs = self.scheduler.plan_sweep()
        self.kv.copy(self.scheduler.take_copies())
        if not runs:
            if self._requests:  # `check` admits only rows that fit an empty tier, so this cannot be waited out
                raise RuntimeError(f"{self.unfinished} requests wait, but the scheduler can admit none of them")
            return self._take_complete()
        try:
            policy = self.config.policy
            block = Block(runs, policy.gpu_batch_size, policy.halves, policy.fetched_rows)
            sampled = self._sampled(block)
        except NonFiniteError:
            self.executor.abandon()
            raise
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            self.executor.abandon()
            if not self._memory.recovers(error):
                raise
            return self._take_complete()
        booked = _Booked()
        for part, sampling in sampled:  # while the first half-block is booked, a GPU still computes the second one
            self._book(part, sampling.chosen(), booked)
        self._fail(booked)
        self.scheduler.end_sweep()
        self.sweeps.add(
            Sweep(
                wall_s=time.perf_counter() - start,
                rows=len(runs),
                tokens=sum(len(run.tokens) for run in runs),
                computed_tokens=block.tokens,
                prompt_tokens=booked.prompt_tokens,
                generated_tokens=booked.generated_tokens,
            )
        )
        return self._take_complete()

    def _sampled(self, block: Block) -> list[tuple[BlockPart, Sampling]]:
        """Compute a sweep, and beside it the masks of its grammars; then have tokens chosen."""
        grammars = (run.owner.sampler.grammar for run in block.runs if run.logits)
        sampled = []
        with self._masks.making([grammar for grammar in grammars if grammar is not None]) as masks:
            for part, logits in self.executor.run(block):
                masks.wait()
                sampled.append((part, self._sampling(part, logits)))
        return sampled

    def _sampling(self, part: BlockPart, logits: torch.Tensor) -> Sampling:
        return Sampling(
            logits,
            [row.sampler for row in part.logit_owners],
            workspace_bytes=self._sampling_bytes,
            upload=self.executor.uploads,
            download=self.executor.downloads.bring,
        )

    def abort(self, request_id: str) -> bool:
        """Drop a request that waits or is in flight; its places and KV are free for the next sweep."""
        for state in self._requests:
            if state.request.request_id == request_id:
                self._drop(state)
                return True
        return False

    def abort_all(self, unwanted: Callable[[str], bool]) -> int:
        """Drop the requests of these ids, as `abort` does; returns how many there were."""
        found = [state for state in self._requests if unwanted(state.request.request_id)]
        for state in found:
            self._drop(state)
        kept = [result for result in self._complete if not unwanted(result.request_id)]
        dropped = len(found) + len(self._complete) - len(kept)
        self._complete = kept
        return dropped

    def clear(self) -> None:
        """Drop every request."""
        self.scheduler.clear()
        self._requests.clear()
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
        tier = max(TIERS, key=self.cache.total)
        mode = AttentionMode.FETCH if self.plan.allocation.fetch_pages else AttentionMode.CPU
        mode = AttentionMode.GPU if tier == "gpu" else mode
        with self.device.computing():
            return self._logits(token_ids, tier, mode)

    def _logits(self, token_ids: list[int], tier: str, mode: AttentionMode) -> torch.Tensor:
        kv = self.cache.open(tier)
        try:
            pieces, step = [], self.config.policy.prefill_tokens
            for i in range(0, len(token_ids), step):
                tokens = token_ids[i : i + step]
                self.cache.reserve(kv, len(tokens))
                run = Run(kv, tokens, mode, len(tokens), row_tokens=len(token_ids))
                [(_, logits)] = self.executor.run(Block([run], 1))
                pieces.append(logits.float().cpu())
                kv.length += len(tokens)
            return torch.cat(pieces)
        finally:
            self.cache.close(kv)

    def close(self) -> None:
        """Stop the threads and close the files; a second call does nothing."""
        self._closed = True
        self._masks.close()
        with self.device.computing():
            self._parts.close()

    def length(self, request: EngineRequest) -> tuple[int, int]:
        """Tokens that a request may generate, and those of its prompt."""
        prompt = len(request.prompt_token_ids)
        return self._rules.limit(request) - prompt, prompt

    def _admissible(self, request: EngineRequest) -> RequestState:
        """The request with its samples.

        Raises:
            RefusedError: it can never run.
        """
        reason = self._rules.refusal(request)
        if reason is not None:
            raise RefusedError(request.request_id, reason)
        return RequestState(request, self._rules)

    def _book(self, part: BlockPart, chosen: Chosen, booked: _Booked) -> None:
        """Give rows what the sweep found for them, and take those out of flight that have ended."""
        tokens = {row: token for row, token in zip(part.logit_owners, chosen.tokens) if token != NOT_FINITE}
        booked.prompt_tokens += sum(self.scheduler.commit(run.owner, tokens.get(run.owner)) for run in part.runs)
        booked.generated_tokens += len(part.logit_owners)
        self._find_failed(part, chosen, booked.failed)
        ended = [run.owner for run in part.runs if run.owner.index < 0 and run.owner.state not in booked.failed]
        ended = [row for row in ended if row.state.end(row)]
        for row, token, logprob in zip(part.logit_owners, chosen.tokens, chosen.logprobs):
            if row.state in booked.failed:
                continue
            row.append_token(token, logprob)
            if row.state.end(row):
                ended.append(row)
        for row in ended:
            self.scheduler.finish(row)
            self._parts.length_estimate.add(row)
            if row.state.complete and row.state in self._requests:  # several of its rows may have ended
                del self._requests[row.state]
                self._complete.append(row.state.result())

    def _find_failed(self, part: BlockPart, chosen: Chosen, failed: dict[RequestState, RequestOutput]) -> None:
        """Add requests that cannot go on, each with its result: their logits are not finite, or their grammar cannot be followed."""
        broken = [row.state for row, token in zip(part.logit_owners, chosen.tokens) if token == NOT_FINITE]
        if part.scores is not None:
            found = iter(part.scores.records([run.top for run in part.scored for _ in run.targets]))
            for run in part.scored:
                records = [next(found) for _ in run.targets]
                run.owner.state.prompt_logprobs += records
                if any(math.isnan(record.logprob) for record in records):
                    broken.append(run.owner.state)
        for state in broken:
            failed.setdefault(state, self._not_finite(state.request))
        for row in part.logit_owners:
            grammar = row.sampler.grammar
            if grammar is not None and grammar.problem is not None:
                failed.setdefault(row.state, row.state.request.failed(grammar.problem, "structured_output_failed"))

    def _not_finite(self, request: EngineRequest) -> RequestOutput:
        cause = overflow() if self.plan.dtype == torch.float16 else DAMAGED
        if not self._warned:
            self._warned = True
            log.warning("logits are not finite, so rows fail: %s", cause)
        return request.failed(f"the model's logits are not finite: {cause}", "non_finite_logits")

    def _fail(self, booked: _Booked) -> None:
        """End the requests that failed in a sweep, which is over."""
        for state, result in booked.failed.items():
            self._drop(state)
            self._complete.append(result)

    def _drop(self, state: RequestState) -> None:
        for row in state.rows:
            self.scheduler.drop(row)
        del self._requests[state]

    def _take_complete(self) -> list[RequestOutput]:
        complete, self._complete = self._complete, []
        return complete


@dataclass(slots=True)
class _Booked:
    """What has been booked in a sweep; ``failed``: requests that end with an error when it is over."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    failed: dict[RequestState, RequestOutput] = field(default_factory=dict)


def _check_format(model: Model, policy: Policy) -> None:
    """That the weights are packed as the policy has them."""
    if policy.compress_weight is not None and model.arch.packed is None:
        raise InfeasibleError(
            f"the policy is for weights in {policy.compress_weight}, and those of {model.arch.name or 'the model'} are not "
            "packed: pack them first, as LLM does below its offload_dir"
        )


def _no_grammars() -> Grammars:
    raise UsageError("structured output needs the model's tokenizer, and there is none")


def _rules(
    model: Model,
    config: EngineConfig,
    plan: EnginePlan,
    detokenize: Detokenizer | None,
    grammars: Callable[[], Grammars],
) -> RequestRules:
    return RequestRules(
        vocab_size=model.arch.vocab_size,
        context=(config.max_model_len or model.arch.max_position) + config.past_context,
        largest_row_tokens=plan.largest_row_tokens,
        default_max_tokens=config.gen_len,
        eos_ids=frozenset(config.eos_ids),
        seed=config.seed,
        detokenize=detokenize,
        grammars=grammars,
        recompute_past=model.arch.rope_switch,
    )
