"""A request in the engine: its samples, how each of them ends, and the result when all have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexmoe.engine.scheduler import Row
from flexmoe.kv.batch import Run
from flexmoe.params import CompletionOutput, EngineRequest, FinishReason, InFlight, RequestOutput, Resumed, TokenLogprob
from flexmoe.sampling.sampler import RowSampler
from flexmoe.sampling.stop_strings import StopStrings


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the engine's requests have in common.

    Attributes:
        eos_ids: ids that end a completion.
        seed: of the draws of requests without one.
        limit: length at which a request ends, prompt included.
        detokenize: text of token ids, for stop strings; None where there is no tokenizer.
        recompute_past: length beyond which a row is computed otherwise (`ModelArch.rope_switch`).
    """

    eos_ids: frozenset[int]
    seed: int
    limit: Callable[[EngineRequest], int]
    detokenize: Callable[[Sequence[int]], Any] | None
    recompute_past: int | None = None


class Sample(Row):
    """One completion of a request, in flight or waiting.

    Args:
        answer: of the request.
        index: among the samples of the request; -1 for the row that only computes the prompt.
        limit: length at which it ends, prompt included.
        before: what was generated earlier.

    Attributes:
        sampler: how its tokens are chosen.
        logprobs: of the generated tokens; None where none are asked.
    """

    __slots__ = ("_stops", "answer", "index", "logprobs", "sampler")

    def __init__(self, answer: Answer, index: int, limit: int, before: Resumed):
        request, rules = answer.request, answer.rules
        super().__init__(request, [*request.prompt_token_ids, *before.token_ids], limit)
        params, generated = request.params, before.token_ids
        self.answer, self.index = answer, index
        self.sampler = RowSampler.of(
            params,
            seed=rules.seed,
            key=request.stream_key or request.request_id,
            index=index,
            prompt=request.prompt_token_ids,
            generated=generated,
        )
        self.logprobs = None if params.logprobs is None else list(before.logprobs or ())
        self._stops = StopStrings(params.stop, rules.detokenize) if params.stop else None

    def next_run(self) -> Run:
        """What it contributes to the sweep that has been planned, with the tokens that it scores."""
        run = super().next_run()
        answer = self.answer
        if answer.scorer is not self or answer.scored:
            return run
        first, last = max(self.cached, len(answer.prompt_logprobs)), min(self.cached + self.run, self.prompt - 1)
        targets, top = self.tokens[first + 1 : last + 1], self.request.params.scores_prompt
        wanted = 0 if self.index < 0 else run.logits
        return replace(run, logits=wanted, targets=targets, score_from=first - self.cached, top=top)

    def took(self, token: int, logprob: TokenLogprob | None) -> None:
        """It got a token, which is the last of ``tokens`` now."""
        self.sampler.took(token)
        if logprob is not None:
            self.logprobs.append(logprob)

    def output(self) -> CompletionOutput | None:
        """The completion, if the last token ended it. Called once for each token, or with those generated earlier."""
        params, token = self.request.params, self.tokens[-1]
        if self.generated:
            if token in self.answer.rules.eos_ids and not params.ignore_eos:
                return self._ended("stop")
            if token in params.stop_token_ids:
                return self._ended("stop", token)
            found = self._stops and self._stops.find(self.generated_ids)
            if found:
                text, stop = found
                return self._ended("stop", stop, text)
        return self._ended("length") if len(self.tokens) >= self.limit else None

    def _ended(self, reason: FinishReason, stop: str | int | None = None, text: str | None = None) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tuple(self.generated_ids),
            finish_reason=reason,
            stop_reason=stop,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


class Answer:
    """What a request has so far.

    Args:
        request: as submitted; what it was resumed with may have ended samples of it already.
        rules: of the engine.

    Attributes:
        rows: those that have to run; the first one computes the prompt, for all that rotate its keys alike.
        scorer: the row that computes the prompt's log-probabilities, where they are asked.
        prompt_logprobs: those known so far; None where none are asked.
    """

    def __init__(self, request: EngineRequest, rules: Rules):
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
        self.rows.sort(
            key=lambda row: row.is_past(past)
        )  # a row is as long as its prompt when it computes that for others
        if not self.scored and (not self.rows or (self.rows[0].is_past(past) and prompt <= past)):
            self.rows.insert(0, Sample(self, -1, prompt, Resumed()))
        self.scorer = self.rows[0] if self.rows and self.prompt_logprobs is not None else None

    @property
    def scored(self) -> bool:
        """Whether the prompt's log-probabilities are complete, or not asked."""
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.request.prompt_token_ids) - 1

    @property
    def complete(self) -> bool:
        """Whether the result is there."""
        return self.scored and len(self._outputs) == len(self._samples)

    def end(self, row: Sample) -> bool:
        """Whether the row, to which a token or a part of the prompt was added, has nothing left to do."""
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
