"""`LLM`: offline generation in the manner of vLLM's offline class."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cost_model.hardware.hardware import Hardware
from cost_model.model.families import dtype_name
from flexmoe.calls.prompts import Conversation, Prompt, one_each, read_conversations, read_prompts
from flexmoe.calls.results import as_asked
from flexmoe.checkpoint.generation_config import SamplingDefaults, generation_config
from flexmoe.engine.engine import Engine
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.engine.requests import RefusedError
from flexmoe.engine.router_counter import LayerStats
from flexmoe.errors import UsageError
from flexmoe.models.loader import Model, load_model
from flexmoe.openai.rendering import read_tools
from flexmoe.outputs import RequestOutput
from flexmoe.params import DEFAULT_MAX_TOKENS, EngineRequest, InFlight, SamplingParams
from flexmoe.planning.configure import ARGUMENTS, configure
from flexmoe.prefixes.digests import page_digests
from flexmoe.prefixes.finder import find_prefixes
from flexmoe.prefixes.order import PrefixOrder
from flexmoe.progress import Progress
from flexmoe.quantizing.packed_copy import packed_copy
from flexmoe.text.tokenizer import Tokenizer, eos_ids
from flexmoe.vllm_arguments import CALL, ENGINE, only_ours
from policies.policy import Policy
from policies.workload import Workload

log = logging.getLogger(__name__)
#: Arguments of `LLM.chat`.
_OF_A_CHAT = (
    "messages",
    "sampling_params",
    "use_tqdm",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
)


class LLM:
    """A model ready to generate; a context manager, which closes it.

    Args:
        model: checkpoint directory, hub id, or with ``load_format="dummy"`` a known shape; or a loaded `Model`.
        policy: ``"auto"`` has the planner choose for this machine (measured once, one to seven minutes) and ``workload``; a path is a
            policy file; None keeps everything on the compute device.
        load_format: ``auto``, or ``dummy`` for random weights.
        workload: mean prompt and completion lengths, in tokens; they size the KV cache, and ``"auto"`` plans for them. Default:
            those of the policy file; else 512 and 128, rows of up to 4,096 tokens.
        hardware: rates to plan with instead of measuring: a `Hardware`, or a file of `python -m flexmoe.probe`.
        gpu_mem, cpu_mem, nvme_mem: most GiB of each tier; None: what the machine has.
        dtype: compute dtype: ``auto`` (as stored), ``bfloat16``, ``float16`` or ``float32``; also a `torch.dtype`, ``half`` and
            ``float``.
        device: ``auto``, ``cuda`` or ``cpu``.
        seed: of the draws of requests without one; None is 0.
        tokenizer: another tokenizer than the checkpoint's, or its directory.
        generation_config: where `get_default_sampling_params` are from: ``auto`` (the checkpoint), ``none`` or ``vllm`` (nowhere), or
            a directory.
        **options: ``gpu_memory_utilization``, the share of the GPU's memory that is ``gpu_mem``; ``compress_weight``, which packs
            16-bit weights once below ``offload_dir`` (in ``int4``, ``int8``, ``fp8`` or ``mxfp4``) and runs those; ``compress_cache``, which keeps
            the KV cache as int8 with a scale for each token and KV head (vLLM's ``kv_cache_dtype="int8"``); further fields of `flexmoe.engine.config.EngineConfig`: ``offload_dir``, ``kv_tokens``, ``longest_row``,
            ``max_model_len``, ``gen_len``, ``eos_ids``, ``keep_spans``, ``reserve``, ``expert_cache``, ``expert_usage``, ``router_stats``, ``check_finite``, ``debug``, ``debug_dir``.

    Raises:
        FlexMoEError: the model is missing or broken, or the policy does not fit; before any weight is loaded.

    Example:
        >>> with LLM("checkpoints/mixtral", gpu_mem=16) as llm:
        ...     for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
        ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        policy: Policy | str | Path | None = "auto",
        load_format: str = "auto",
        workload: Workload | None = None,
        hardware: Hardware | str | Path | None = None,
        gpu_mem: float | None = None,
        cpu_mem: float | None = None,
        nvme_mem: float | None = None,
        dtype: Any = "auto",
        device: str = "auto",
        seed: int | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
        generation_config: str = "auto",
        **options: Any,
    ) -> None:
        options |= {"gpu_mem": gpu_mem, "cpu_mem": cpu_mem, "nvme_mem": nvme_mem}
        options |= {"dtype": dtype_name(dtype), "device": device, "seed": seed or 0}
        options = only_ours("LLM", options, ARGUMENTS, ENGINE)
        self.model = model if isinstance(model, Model) else load_model(str(model), load_format, options["dtype"])
        self.tokenizer = _tokenizer(self.model, tokenizer)
        if self.tokenizer.problem is not None:
            log.warning("%s; prompts of token ids run without it", self.tokenizer.problem)
        self._generation_config = generation_config
        config = configure(self.model, policy, workload, hardware, **options)
        if not config.eos_ids:
            ids = eos_ids(self.model.generation_config, self.model.config, self.tokenizer)
            config = replace(config, eos_ids=ids)
        if config.policy.compress_weight is not None:
            EnginePlan.of(self.model, config)  # what does not fit is refused before the weights are packed
            bar = sys.stderr is not None and sys.stderr.isatty()
            format, directory = config.policy.compress_weight, config.offload_dir
            self.model = packed_copy(self.model, format, directory, dtype=config.dtype, bar=bar)
        self.engine = Engine(self.model, config, self.tokenizer.detokenize, self.tokenizer.grammars)
        self._streaming = False
        self._left: list[InFlight] = []

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **theirs: Any,
    ) -> list[RequestOutput]:
        """Complete prompts; rows that run longest start first.

        Args:
            prompts: texts, lists of token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; one or several.
            sampling_params: for all prompts, or one per prompt; default: `get_default_sampling_params`. Without ``max_tokens``
                a completion has ``gen_len`` tokens, or 32.
            use_tqdm: draw a bar on stderr, where that is a terminal; elsewhere a line is logged now and then.
            **theirs: other arguments of vLLM's, where they ask for nothing.

        Returns:
            list[RequestOutput]: in the order of the prompts.

        Raises:
            UsageError: a prompt can never run; nothing has been generated then.
            DataError: a prompt is text, and the checkpoint has no tokenizer.

        Example:
            >>> llm.generate(["Name three rivers.", [1, 733, 16289]], SamplingParams(max_tokens=32))
        """
        only_ours("generate", theirs, ("prompts", "sampling_params", "use_tqdm"), CALL)
        several = read_prompts(prompts)
        texts = [prompt.text for prompt in several if prompt.token_ids is None and prompt.text is not None]
        encoded = iter(self.tokenizer.encode_all(texts))
        ids = [next(encoded) if prompt.token_ids is None else prompt.token_ids for prompt in several]
        shown, most = [prompt.text for prompt in several], self.engine.config.gen_len or DEFAULT_MAX_TOKENS
        return self._complete(ids, shown, sampling_params, use_tqdm, max_tokens=most)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **theirs: Any,
    ) -> list[RequestOutput]:
        """Answer chats under the checkpoint's chat template.

        Args:
            messages: one conversation, a list of ``{"role": …, "content": …}``; or several.
            sampling_params: for all conversations, or one per conversation; default: `get_default_sampling_params`. Without
                ``max_tokens`` an answer has ``gen_len`` tokens, or the rest of the context, as far as the KV cache has room.
            use_tqdm: draw a bar on stderr, where that is a terminal; elsewhere a line is logged now and then.
            chat_template: a template in Jinja instead of the checkpoint's.
            add_generation_prompt: end the prompt with what begins the assistant's answer.
            continue_final_message: end it with the content of the last message, which the completion continues; needs
                ``add_generation_prompt=False``.
            chat_template_kwargs: more variables for the template, such as ``enable_thinking``.
            tools: functions that the template describes, as OpenAI has them; calls of them are part of the text.
            **theirs: other arguments of vLLM's, where they ask for nothing.

        Returns:
            list[RequestOutput]: in the order of the conversations; ``prompt`` is the rendered chat.

        Raises:
            UsageError: these are no messages, or a chat can never run.
            DataError: there is no tokenizer or template, or the template refuses the messages.

        Example:
            >>> llm.chat([{"role": "user", "content": "Name three rivers."}], SamplingParams(max_tokens=32))
        """
        only_ours("chat", theirs, _OF_A_CHAT, CALL)
        if add_generation_prompt and continue_final_message:
            raise UsageError("continue_final_message continues a message; give add_generation_prompt=False with it")
        variables = {**(chat_template_kwargs or {}), **({"tools": list(read_tools(tools))} if tools else {})}
        tokenizer = self.tokenizer if chat_template is None else self.tokenizer.with_chat_template(chat_template)
        rendered = [
            tokenizer.render(
                chat,
                variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for chat in read_conversations(messages)
        ]
        return self._complete(
            tokenizer.encode_all(rendered, add_special_tokens=False), rendered, sampling_params, use_tqdm
        )

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer, as transformers' `AutoTokenizer` loads it.

        Raises:
            DataError: the checkpoint has none.
        """
        return self.tokenizer.backend

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no parameters are given: those of the model's generation_config.json, else the defaults.

        Raises:
            InputMissingError: another was named, and is not there.
            DataError: a value there cannot be used.
        """
        choice = "none" if self._generation_config == "vllm" else self._generation_config
        return SamplingParams(**SamplingDefaults.of(generation_config(choice, self.model.generation_config)).values)

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
            return request.failed(refused.reason)
        return None

    def check(self, request: EngineRequest) -> str | None:
        """Why a request can never run, as a sentence; None if it can."""
        return self.engine.check(request)

    def _ungrammatical(self, params: SamplingParams) -> str | None:
        """Why there are no completions of the structure that is asked for."""
        return None if params.structure is None else self.tokenizer.grammars().problem(params.structure)

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

    def metrics(self) -> dict[str, Any]:
        """What has been done so far: tokens, sweeps, bytes and busy seconds per lane, planned bytes per tier.

        What is listed sweep by sweep is of the last ones alone (`flexmoe.engine.sweep_log`), all else of all.
        """
        e = self.engine
        totals = e.sweeps.totals
        lanes = {
            lane: {"bytes": t.nbytes, "busy_s": t.busy_s, "worker_s": t.worker_s}
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
            "prefix_cache": e.scheduler.prefix_metrics(),
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

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def in_waiting_order(
        self, prompts: Sequence[tuple[int, ...]], sampling_params: Sequence[SamplingParams]
    ) -> list[EngineRequest]:
        """Requests for a `stream`, with the prompts' places as ids: those that generate most first, and those that begin alike
        together.

        Args:
            prompts: token ids.
            sampling_params: of each.

        Raises:
            UsageError: one can never run.
        """
        caching = self.engine.config.prefix_caching
        tree = find_prefixes(page_digests(ids) if caching else b"" for ids in prompts)
        requests = [
            EngineRequest(request_id=str(i), prompt_token_ids=ids, params=params, prefix_ends=tree.ends(i))
            for i, (ids, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]
        for request in requests:
            problem = self.check(request) or self._ungrammatical(request.params)
            if problem is not None:
                raise UsageError(f"prompt {request.request_id}: {problem}")
        order = PrefixOrder(tree, tree.nodes, lambda row: self.engine.length(requests[row]))
        return [requests[i] for i in order.waiting(range(len(requests)), max(1, len(requests)))]

    def _complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        texts: Sequence[str | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        *,
        max_tokens: int | None = None,
    ) -> list[RequestOutput]:
        """Runs prompts of token ids, and adds the texts of the prompts.

        Args:
            max_tokens: of those that have none; None leaves it to the engine.
        """
        default = self.get_default_sampling_params() if sampling_params is None else sampling_params
        several = one_each(default, len(prompts))
        if max_tokens is not None:
            several = [params.limited(max_tokens) for params in several]
        requests = self.in_waiting_order(prompts, several)
        outputs: dict[int, RequestOutput] = {}
        drawn = use_tqdm and sys.stderr is not None and sys.stderr.isatty()
        progress, last = Progress(len(requests), 0, bar=drawn, left=None, what="Processed prompts"), self.tokens

        def swept() -> None:
            nonlocal last
            before, last = last, self.tokens
            progress.sweep(last[0] - before[0], last[1] - before[1])

        with contextlib.closing(progress):
            for output in self.stream(requests, swept):
                outputs[int(output.request_id)] = output
                progress.row()
        if requests:
            log.info("%d prompts, %s", len(requests), progress.describe())
        return [as_asked(outputs[i], texts[i], self.tokenizer) for i in range(len(prompts))]


def _tokenizer(model: Model, directory: str | Path | Tokenizer | None) -> Tokenizer:
    """The tokenizer of a directory, or the model's own."""
    if isinstance(directory, Tokenizer):
        return directory
    if directory is None or str(directory) == model.arch.name:
        return Tokenizer.load(model.directory) if model.directory else Tokenizer(None, "a dummy")
    if not Path(directory).is_dir():
        raise UsageError(f"tokenizer is {str(directory)!r}, which is no directory; give one that holds a tokenizer")
    return Tokenizer.load(directory)
