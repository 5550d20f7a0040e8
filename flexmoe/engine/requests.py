"""A request in the engine: whether it may run, its samples, how each of them ends, and the result when all have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flexmoe.engine.scheduler import Row
from flexmoe.errors import FlexMoEError, UsageError
from flexmoe.kv.batch import Run
from flexmoe.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprob
from flexmoe.params import EngineRequest, InFlight, Resumed, SamplingParams
from flexmoe.sampling.sampler import RowSampler
from flexmoe.sampling.stop_strings import StopStrings
from flexmoe.structured.grammars import Grammars
from flexmoe.structured.row import RowGrammar

#: Text of token ids; takes ``skip_special_tokens`` too, which is True otherwise.
Detokenizer = Callable[..., str]


class RefusedError(UsageError):
    """A request that can never run.

    Args:
        request_id: of the request.
        reason: a sentence.
    """

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(f"request {request_id}: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """What the engine's requests have in common: which may run, and how they end.

    Attributes:
        vocab_size: token ids are below it.
        context: most tokens of a prompt and its completion.
        largest_row_tokens: tokens of the longest row that the KV cache and its buffers hold.
        default_max_tokens: ``max_tokens`` of requests without one; None: they are open, and have all the room there is.
        eos_ids: ids that end a completion.
        seed: of the draws of requests without one.
        detokenize: text of token ids; None where there is no tokenizer.
        grammars: what compiles grammars, or raises why there is nothing that does.
        recompute_past: length beyond which a row is computed otherwise (`ModelArch.rope_switch`); None: none.
    """

    vocab_size: int
    context: int
    largest_row_tokens: int
    default_max_tokens: int | None
    eos_ids: frozenset[int]
    seed: int
    detokenize: Detokenizer | None
    grammars: Callable[[], Grammars]
    recompute_past: int | None = None

    def limit(self, request: EngineRequest) -> int:
        """Length at which a request ends, prompt included."""
        asked, prompt = request.params.max_tokens, len(request.prompt_token_ids)
        wanted = self.default_max_tokens if asked is None else asked
        if wanted is None:  # the last token never enters the cache, and one is generated at least
            return min(max(prompt, self.largest_row_tokens) + 1, self.context)
        return min(prompt + wanted, self.context)

    def refusal(self, request: EngineRequest) -> str | None:
        """Why a request can never run, as a sentence; None if it can."""
        return self._refused_prompt(request) or self._refused_params(request) or self._refused_resumption(request)

    def _refused_prompt(self, request: EngineRequest) -> str | None:
        prompt, limit = request.prompt_token_ids, self.limit(request)
        if not prompt:
            return "the prompt has no tokens"
        wrong = next((t for t in (min(prompt), max(prompt)) if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            return f"token id {wrong} is outside the vocabulary of {self.vocab_size}"
        has = f"the prompt has {len(prompt)} tokens; the model's context"
        if len(prompt) >= self.context and request.params.max_tokens != 0:
            return f"{has} of {self.context} leaves no room for one more"
        if len(prompt) > self.context:
            return f"{has} is {self.context}"
        if limit - 1 > self.largest_row_tokens:  # the last token never enters the cache
            return (
                f"prompt and completion may reach {limit} tokens, but the KV cache and its buffers were planned for at "
                f"most {self.largest_row_tokens} in one row; lower max_tokens, shorten the prompt, or give the KV cache "
                "more memory"
            )
        return None

    def _refused_params(self, request: EngineRequest) -> str | None:
        params, vocab = request.params, self.vocab_size
        if params.biased_tokens and params.biased_tokens[-1][0] >= vocab:
            return (
                f"logit_bias names token id {params.biased_tokens[-1][0]}, which is outside the vocabulary of {vocab}"
            )
        if params.stop and self.detokenize is None:
            return "stop strings need the model's tokenizer, and there is none; use stop_token_ids"
        if params.structure is not None:
            try:
                self.grammars()
            except FlexMoEError as error:
                return str(error)
        return None

    def grammar(self, params: SamplingParams, generated: Sequence[int]) -> RowGrammar | None:
        """The grammar of a row that resumes after some tokens; None where it is free."""
        if params.structure is None:
            return None
        ends = {*(() if params.ignore_eos else self.eos_ids), *params.stop_token_ids}
        return RowGrammar(self.grammars(), params.structure, ends, generated)

    def _refused_resumption(self, request: EngineRequest) -> str | None:
        params, resumed = request.params, request.resumed
        if resumed and len(resumed) != params.n:
            return f"it resumes {len(resumed)} samples and asks for n = {params.n}"
        for state in resumed:
            ids = state.token_ids
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                return f"it resumes with a token id outside the vocabulary of {self.vocab_size}"
            if params.logprobs is not None and len(state.logprobs or ()) != len(state.token_ids):
                return "it resumes without the log-probabilities that it asks for"
        return None


class Sample(Row):
    """One completion of a request, in flight or waiting.

    Args:
        state: of the request.
        index: among the samples of the request; -1 for the row that only computes the prompt.
        limit: length at which it ends, prompt included.
        before: what was generated earlier.

    Attributes:
        sampler: chooses its tokens.
        logprobs: of the generated tokens; None where none are asked.
    """

    __slots__ = ("_detokenize", "_stops", "index", "logprobs", "sampler", "state")

    def __init__(self, state: RequestState, index: int, limit: int, before: Resumed):
        request, rules = state.request, state.rules
        super().__init__(request, [*request.prompt_token_ids, *before.token_ids], limit)
        params, generated = request.params, before.token_ids
        self.state, self.index = state, index
        self.sampler = RowSampler.of(
            params,
            seed=rules.seed,
            key=request.stream_key or request.request_id,
            index=index,
            prompt=request.prompt_token_ids,
            generated=generated,
            eos_ids=rules.eos_ids,
            grammar=rules.grammar(params, generated),
        )
        self.logprobs = None if params.logprobs is None else list(before.logprobs or ())
        self._detokenize: Detokenizer | None = None
        self._stops: StopStrings | None = None
        if rules.detokenize is not None and params.detokenize:
            self._detokenize = partial(rules.detokenize, skip_special_tokens=params.skip_special_tokens)
        if params.stop and self._detokenize is not None:
            included, after = params.include_stop_str_in_output, params.min_tokens
            self._stops = StopStrings(params.stop, self._detokenize, after=after, included=included)

    def next_run(self) -> Run:
        """What it contributes to the sweep that has been planned, with the tokens that it scores."""
        run, scores = super().next_run(), self.state.prompt_logprobs
        if self.state.scorer is not self or scores is None or self.state.scored:
            return run
        first, last = max(self.cached, len(scores)), min(self.cached + self.run, self.prompt - 1)
        targets, top = self.tokens[first + 1 : last + 1], self.request.params.scores_prompt or 0
        wanted = 0 if self.index < 0 else run.logits
        return replace(run, logits=wanted, targets=targets, score_from=first - self.cached, top=top)

    def append_token(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take in what was chosen for it; the scheduler has put the token at the end of ``tokens`` already."""
        self.sampler.append_token(token)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)

    def output(self) -> CompletionOutput | None:
        """The completion, if the last token ended it. Called once for each token, or with those generated earlier."""
        params, token = self.request.params, self.tokens[-1]
        if self.generated:
            if token in self.state.rules.eos_ids and not params.ignore_eos:
                return self._ended("stop")
            if token in params.stop_token_ids:
                return self._ended("stop", token)
            found = self._stops and self._stops.find(self.generated_ids)
            if found:
                text, stop = found
                return self._ended("stop", stop, text)
            grammar = self.sampler.grammar
            if grammar is not None and grammar.is_complete:
                return self._ended("stop", cut=False)
        return self._ended("length") if len(self.tokens) >= self.limit else None

    def _ended(
        self,
        reason: FinishReason,
        stop: str | int | None = None,
        text: str | None = None,
        *,
        cut: bool = True,
    ) -> CompletionOutput:
        if text is None and self._detokenize is not None:
            cut = cut and reason == "stop" and not self.request.params.include_stop_str_in_output
            text = self._detokenize(self.generated_ids[:-1] if cut else self.generated_ids)
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tuple(self.generated_ids),
            finish_reason=reason,
            stop_reason=stop,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


class RequestState:
    """A request with its samples, and what it has so far.

    Args:
        request: as submitted; what it was resumed with may have ended samples of it already.
        rules: of the engine.

    Attributes:
        rows: those that have to run; the first one computes the prompt, for all that rotate its keys alike.
        scorer: the row that computes the prompt's log-probabilities, where they are asked.
        prompt_logprobs: those known so far; None where none are asked.
    """

    def __init__(self, request: EngineRequest, rules: RequestRules):
        self.request, self.rules = request, rules
        params, prompt = request.params, len(request.prompt_token_ids)
        self.prompt_logprobs: list[TokenLogprob] | None = None if params.scores_prompt is None else []
        self._outputs: dict[int, CompletionOutput] = {}
        limit, resumed = rules.limit(request), request.resumed or (Resumed(),) * params.n
        self._samples = [Sample(self, index, limit, before) for index, before in enumerate(resumed)]
        for sample in self._samples:
            if sample.generated or limit == prompt:
                self.end(sample)
        self.rows = [sample for sample in self._samples if sample.index not in self._outputs]
        past = rules.recompute_past
        # The first row computes the prompt for those that rotate its keys alike, and is as long as its prompt then.
        self.rows.sort(key=lambda row: row.is_past(past))
        all_past = past is not None and bool(self.rows) and self.rows[0].is_past(past) and prompt <= past
        if not self.scored and (not self.rows or all_past):
            self.rows.insert(0, Sample(self, -1, prompt, Resumed()))
        self.scorer: Sample | None = self.rows[0] if self.rows and self.prompt_logprobs is not None else None
        if self.scorer is not None and not self.scored:
            self.scorer.computes_all = True

    @property
    def scored(self) -> bool:
        """Whether the prompt's log-probabilities are complete, or not asked."""
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.request.prompt_token_ids) - 1

    @property
    def complete(self) -> bool:
        """Whether the result is there."""
        return self.scored and len(self._outputs) == len(self._samples)

    def end(self, row: Sample) -> bool:
        """Whether the row, to which a token or a part of the prompt was added, has nothing left to do; if so, its
        completion is kept."""
        if row.index < 0:
            return self.scored
        output = row.output()
        if output is not None:
            self._outputs[row.index] = output
        return output is not None

    def result(self) -> RequestOutput:
        """The result of a complete request."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=None,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[self._outputs[index] for index in range(len(self._samples))],
            finished=True,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            num_cached_tokens=min((row.found_tokens for row in self.rows if row.found_tokens is not None), default=0),
        )

    def in_flight(self) -> list[InFlight]:
        """Its samples that have generated something."""
        return [
            InFlight(
                request_id=self.request.request_id,
                index=sample.index,
                token_ids=sample.generated_ids,
                logprobs=sample.logprobs,
            )
            for sample in self._samples
            if sample.generated
        ]
