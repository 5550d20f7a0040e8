"""`LLM`: offline generation in the manner of vLLM's offline API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import torch

from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine import Engine
from flexmoe.engine.requests import RefusedError
from flexmoe.engine.router_counter import LayerStats
from flexmoe.errors import UsageError
from flexmoe.models.loader import Model, load_model
from flexmoe.params import CompletionOutput, EngineRequest, InFlight, RequestOutput, SamplingParams
from flexmoe.text.tokenizer import Tokenizer, eos_ids
from policies.policy import Policy, PolicyFile, Workload

Prompt = str | Sequence[int]

#: Everything in (CPU or GPU) compute memory: what a model that fits wants.
RESIDENT = (100, 0, 100, 0, 100, 0)


class LLM:
    """A model ready to generate.

    Args:
        model: checkpoint directory, hub id, or with ``load_format="dummy"`` a known shape; or a `Model`.
        policy: a `Policy`, or a path to a policy file; None keeps everything on the compute device.
        load_format: ``auto`` or ``dummy``.
        workload: mean prompt and completion lengths; with the policy they size the KV cache. Default 512/32.
        **options: fields of `EngineConfig` (``device``, ``dtype``, ``gpu_mem``, ``cpu_mem``, ``nvme_mem`` in GiB,
            ``offload_dir``, ``kv_tokens``, ``longest_row``, ``gen_len``, ``keep_spans``, ``seed``, ``reserve``, ``router_stats``).

    Raises:
        FlexMoEError: the model is missing or broken, or the policy does not fit; before any weight is loaded.

    Example:
        >>> llm = LLM("checkpoints/mixtral", policy="policy.json")
        >>> [out.outputs[0].text for out in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))]
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        policy: Policy | str | Path | None = None,
        load_format: str = "auto",
        workload: Workload | None = None,
        **options,
    ):
        self.model = model if isinstance(model, Model) else load_model(str(model), load_format)
        self.tokenizer = Tokenizer.load(self.model.directory) if self.model.directory else Tokenizer(None, "a dummy")
        workload, policy = self._read_policy(policy, workload)
        try:
            config = EngineConfig(policy=policy, workload=workload, **options)
        except TypeError as e:
            raise UsageError(f"LLM: {e}") from e
        if not config.eos_ids:
            ids = eos_ids(self.model.generation_config, self.model.config, self.tokenizer)
            config = replace(config, eos_ids=ids)
        self.engine = Engine(self.model, config, self.tokenizer.decode if self.tokenizer.is_available else None)
        self._streaming = False
        self._left: list[InFlight] = []

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete prompts; rows that run longest start first.

        Args:
            prompts: texts or lists of token ids; one or several.
            params: for all prompts, or one per prompt.

        Returns:
            list[RequestOutput]: in the order of the prompts.

        Raises:
            UsageError: a prompt can never run; nothing has been generated then.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if prompts and isinstance(prompts[0], Integral):
            prompts = [prompts]
        prompts = [_checked(i, prompt) for i, prompt in enumerate(prompts)]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but {len(params)} sampling parameters; give one per prompt")
        ids = [tuple(self.tokenizer.encode(p) if isinstance(p, str) else p) for p in prompts]
        requests = [
            EngineRequest(request_id=str(i), prompt_token_ids=t, params=s) for i, (t, s) in enumerate(zip(ids, params))
        ]
        for request in requests:
            problem = self.check(request)
            if problem is not None:
                raise UsageError(f"prompt {request.request_id}: {problem}")
        longest_first = sorted(requests, key=lambda r: len(r.prompt_token_ids) - self.engine.limit(r))
        outputs = {int(out.request_id): out for out in self.stream(longest_first)}
        return [self._with_text(outputs[i], prompts[i]) for i in range(len(prompts))]

    def stream(
        self, requests: Iterable[EngineRequest], on_sweep: Callable[[], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Run requests as they come and yield each when it finishes, in any order.

        Requests are pulled lazily: no more wait in the engine than one block. One that can never run is
        yielded with its ``error``. The engine is empty again when the iterator ends or is closed.

        Args:
            on_sweep: called after every sweep, when the requests that finished in it have been yielded: `in_flight`
                then tells of all others. What it raises ends the stream.
        """
        if self._streaming:
            raise UsageError("another stream of this LLM is open; finish or close it first")
        source, exhausted = iter(requests), False
        ahead = self.engine.config.policy.block_size
        self._streaming, self._left = True, []
        try:
            while not exhausted or self.engine.unfinished:
                while not exhausted and self.engine.waiting < ahead:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                    elif refused := self._submit(request):
                        yield refused
                yield from self.engine.step()
                if on_sweep is not None:
                    on_sweep()
        except Exception:
            self._left = self.engine.in_flight()  # who stores it loses nothing by the failure
            raise
        finally:
            self._streaming = False
            self.engine.clear()

    def _submit(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request; the result of one that can never run."""
        try:
            self.engine.submit(request)
        except RefusedError as refused:
            return _failed(request, refused.reason)
        return None

    def check(self, request: EngineRequest) -> str | None:
        """Why a request can never run, as a sentence; None if it can."""
        return self.engine.check(request)

    def in_flight(self) -> list[InFlight]:
        """What the samples of unfinished requests have generated so far; those without a token are left out.

        For the consumer of a `stream`, from its ``on_sweep``: while the results of a sweep are being yielded, those
        that are still to come are in neither. After a stream that failed: what they had when it did.
        """
        return self.engine.in_flight() if self._streaming else self._left

    @property
    def largest_row_tokens(self) -> int:
        """Tokens of the longest prompt and completion that the KV cache and its buffers hold."""
        return self.engine.largest_row_tokens

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt tokens computed and tokens generated so far."""
        totals = self.engine.sweeps.totals
        return totals.prompt_tokens, totals.generated_tokens

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits ``[len(token_ids), vocab]`` after every token of one sequence."""
        return self.engine.logits(list(token_ids))

    def metrics(self) -> dict:
        """What has been done so far: tokens, sweeps, bytes and busy seconds per lane, planned bytes per tier.

        What is listed sweep by sweep is of the last ones alone (`flexmoe.engine.sweep_log`), all else of all.
        """
        e = self.engine
        totals = e.sweeps.totals
        lanes = {
            lane: {"bytes": t.nbytes, "busy_s": t.busy_s, "active_s": t.active_s}
            for lane, t in e.recorder.totals().items()
        }
        memory = e.plan.memory
        return {
            "sweeps": len(e.sweeps),
            "wall_s": totals.wall_s,
            "prompt_tokens": totals.prompt_tokens,
            "generated_tokens": totals.generated_tokens,
            "run_tokens": totals.tokens,
            "computed_tokens": totals.computed_tokens,
            "prefill_s": totals.prefill_s,
            "decode_s": totals.decode_s,
            "decode_only_tokens": totals.decode_tokens,
            "mean_rows_in_flight": totals.rows / max(1, len(e.sweeps)),
            "most_rows_in_flight": totals.most_rows,
            "rows_in_flight": [s.rows for s in e.sweeps],
            "tokens_per_sweep": [s.tokens for s in e.sweeps],
            "generated_tokens_per_sweep": [s.generated_tokens for s in e.sweeps],
            "prompt_tokens_per_sweep": [s.prompt_tokens for s in e.sweeps],
            "sweep_s": [s.wall_s for s in e.sweeps],
            "restarts": e.scheduler.restarts,
            "lanes": lanes,
            "memory": {t: {"planned_bytes": memory.total(t), **memory.parts[t]} for t in memory.parts},
            "weights_stall_s": e.feed.stall_s,
            "expert_cache": e.feed.metrics(),
        }

    def router_stats(self, layer: int) -> LayerStats:
        """How often each expert of a layer has been chosen, how evenly, and with ``router_stats=True`` which ones together.

        Raises:
            UsageError: there is no such layer, it is dense, or nothing has been routed yet.

        Example:
            >>> llm.generate(prompts)
            >>> llm.router_stats(0).counts, llm.router_stats(0).balance.max_over_mean
        """
        return self.engine.router_counter.layer(layer)

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.engine.close()

    def _read_policy(self, policy, workload: Workload | None) -> tuple[Workload, Policy]:
        if isinstance(policy, (str, Path)):
            file = PolicyFile.load(policy)
            file.check_model(self.model.arch.fingerprint())
            return workload or file.planned_workload() or Workload(prompt_len=512, gen_len=32), file.policy
        workload = workload or Workload(prompt_len=512, gen_len=32)
        if policy is None:
            policy = Policy.from_percent(
                RESIDENT, gpu_batch_size=32, num_gpu_batches=1, prompt_len=workload.prompt_len, gen_len=workload.gen_len
            )
        return workload, policy

    def _with_text(self, output: RequestOutput, prompt: Prompt) -> RequestOutput:
        outputs = [replace(c, text=self._text(c)) for c in output.outputs]
        return replace(output, prompt=prompt if isinstance(prompt, str) else None, outputs=outputs)

    def _text(self, completion: CompletionOutput) -> str | None:
        if completion.text is not None:
            return completion.text
        ended = completion.finish_reason == "stop"
        return self.tokenizer.decode(completion.token_ids[:-1] if ended else completion.token_ids)


def _checked(index: int, prompt: Prompt) -> Prompt:
    """A text as it is, token ids as plain integers.

    Raises:
        UsageError: the prompt is neither.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Iterable) and not isinstance(prompt, bytes):
        ids = list(prompt)
        if all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
            return [int(i) for i in ids]
    raise UsageError(f"prompt {index} is {prompt!r:.80}; give a text or a list of token ids")


def _failed(request: EngineRequest, problem: str) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        prompt=None,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[],
        finished=True,
        error=problem,
    )
