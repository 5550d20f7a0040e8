"""`FlexMoELM`: the engine as a model of EleutherAI's lm-evaluation-harness.

Requests of all kinds become rows of one stream, so that the policy, not a batch size, says how many run at once. Texts are
tokenized, cut and stopped as by the harness's own `hf` model, whose scores these are in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flexmoe.errors import DataError, UsageError
from flexmoe.llm import LLM
from flexmoe.lm_eval.scoring import Question, scores
from flexmoe.lm_eval.stream import completed
from flexmoe.models.loader import load_model
from flexmoe.params import SamplingParams

log = logging.getLogger(__name__)
#: Tokens of a completion whose task does not say how many, as with `hf`.
_MAX_GEN_TOKS = 256
#: Batch sizes that ask for nothing; the harness gives 1 where the user gives none.
_NO_BATCH_SIZE = (None, 1, "1", "auto")


@register_model("flexmoe")
class FlexMoELM(TemplateLM):
    """``--model flexmoe``; its arguments are those of ``--model_args``.

    Args:
        pretrained: checkpoint directory or hub id.
        policy: ``auto`` plans for this machine, which is measured once; a path is a policy file; ``none`` keeps everything on the
            compute device.
        max_length: most tokens that a prediction may depend on. Default: the model's context. The KV cache holds a row of that
            length.
        max_gen_toks: most tokens of a completion whose task names none.
        add_bos_token: whether the tokenizer's own special tokens are added; default: as the tokenizer does.
        prefix_token_id: what a text without a context depends on. Default: BOS, or else EOS.
        batch_size, max_batch_size: taken because the harness gives them; the policy says how many rows run at once.
        device: ``auto``, ``cuda`` or ``cpu``.
        **options: the other arguments of `flexmoe.LLM`: ``gpu_mem``, ``cpu_mem``, ``dtype``, ``offload_dir`` …

    Raises:
        FlexMoEError: the model is missing or broken, or the policy does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size not in _NO_BATCH_SIZE or max_batch_size is not None:
            log.warning("batch_size changes nothing: the policy says how many rows run at once")
        model = load_model(str(pretrained), options.pop("load_format", "auto"), options.get("dtype", "auto"))
        self.max_length = max_length or model.arch.max_position
        self.llm = LLM(
            model,
            policy=None if str(policy).lower() == "none" else policy,
            max_model_len=self.max_length,
            past_context=True,
            device=device or "auto",
            **options,
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.max_gen_toks = max_gen_toks
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id that a text without a context depends on."""
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(int(token) for token in known if token is not None)

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells caches of requests apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; one that begins with BOS gets no other."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        added = self._add_bos_token if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, **({} if added is None else {"add_special_tokens": added})))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat. Where the template knows no system's role, without its messages."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except DataError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            log.warning("%s; the chat is written without its system's messages", error)
            return self._rendered(others, add_generation_prompt)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the model's context."""
        windows = [(number, pair) for number, each in enumerate(requests) for pair in self._windows(each.args[0])]
        scored = self._loglikelihood_tokens([(None, *pair) for _, pair in windows], disable_tqdm=disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, _), (logprob, _) in zip(windows, scored, strict=True):
            sums[number] += logprob
        for each, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", each.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context, up to the first of its stop strings."""
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        asked, stops = [], []
        for each in requests:
            context, (params, until) = each.args[0], self._params(each.args[1], eos)
            asked.append((self._cut(context, params.max_tokens or 0), params))
            stops.append(until)
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for place, output in completed(self.llm, asked):
            ids = list(output.outputs[0].token_ids)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            texts[place] = postprocess_generated_text(text, stops[place], None)
            self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
            bar.update(1)
        bar.close()
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model beside its arguments."""
        engine = self.llm.engine
        return {"model_dtype": str(engine.plan.dtype), "flexmoe_policy": asdict(engine.config.policy)}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        questions = [Question.of(context, continuation, self.max_length) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for place, score in scores(self.llm, questions):
            found[place] = score.logprob, score.is_greedy
            texts = requests[place][0]
            if texts is not None:  # else a window of a longer text
                self.cache_hook.add_partial("loglikelihood", texts, found[place])
            bar.update(1)
        bar.close()
        return found

    def _rendered(self, chat: Sequence[Mapping[str, str]], opened: bool) -> str:
        return self.llm.tokenizer.render(chat, add_generation_prompt=opened, continue_final_message=not opened)

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts and continuations that together are a text, each of its tokens once."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, windows)

    def _params(self, gen_kwargs: Mapping[str, Any], eos: str) -> tuple[SamplingParams, list[str]]:
        """What a task asks of a completion, and its stop strings."""
        if not isinstance(gen_kwargs, Mapping):
            raise UsageError(f"the generation_kwargs of a task are {gen_kwargs!r:.80}; give a mapping")
        given = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        stops = [stop for stop in given.pop("until") if stop]
        given.pop("do_sample")
        params = SamplingParams(max_tokens=given.pop("max_gen_toks"), stop=tuple(stops), **given)
        return params, handle_stop_sequences(list(stops), eos=eos)

    def _cut(self, context: str, max_tokens: int) -> tuple[int, ...]:
        """The end of a context that leaves room for its completion.

        Raises:
            UsageError: there is no room for anything else.
        """
        room = self.max_length - max_tokens
        if room <= 0:
            raise UsageError(
                f"a task asks for {max_tokens} new tokens, and max_length is {self.max_length}; lower its max_gen_toks"
            )
        special = False if has_bos_prefix(context, self.tokenizer.bos_token) else None
        return tuple(self.tok_encode(context, special)[-room:])
