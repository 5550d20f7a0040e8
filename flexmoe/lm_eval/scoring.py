"""How probable continuations are.

There are two ways to a score. The log-probabilities of a prompt's own tokens are those of context and continuation together
(``prompt_logprobs``). For a continuation of one token the context alone is the prompt, and the token is generated: a logit
bias makes it the one that is chosen, and reported log-probabilities are those without the bias. So answers to one question
share what they have in common (whole pages of it), which prompts that are scored do not. A window that fills the model's
context goes this way too: its last token has no place in a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexmoe.llm import LLM
from flexmoe.lm_eval.stream import completed
from flexmoe.outputs import RequestOutput, TokenLogprob
from flexmoe.params import MAX_BIAS, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How probable are the last tokens of a sequence?

    Args:
        token_ids: context and continuation.
        scored: tokens of the continuation.
        forced: the last token is generated, not part of the prompt.
    """

    token_ids: tuple[int, ...]
    scored: int
    forced: bool

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], max_length: int) -> Question:
        """For a continuation of a context, of which the last `max_length` tokens before the last one count."""
        ids = (*context, *continuation)[-(max_length + 1) :]
        scored = min(len(continuation), len(ids) - 1)
        return cls(token_ids=ids, scored=scored, forced=scored == 1 or len(ids) > max_length)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What is computed."""
        return self.token_ids[:-1] if self.forced else self.token_ids

    @property
    def params(self) -> SamplingParams:
        """How it is asked."""
        in_prompt = 1 if self.scored - self.forced > 0 else None
        if not self.forced:
            return SamplingParams(max_tokens=0, prompt_logprobs=1)
        bias = {self.token_ids[-1]: MAX_BIAS}
        return SamplingParams(
            max_tokens=1, logprobs=1, prompt_logprobs=in_prompt, logit_bias=bias, ignore_eos=True, detokenize=False
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The natural log-probability of a continuation, and whether each of its tokens is the most probable one."""

    logprob: float
    is_greedy: bool


def scores(llm: LLM, questions: Sequence[Question]) -> Iterator[tuple[int, Score]]:
    """The score of each question, in any order, with its place.

    Raises:
        UsageError: a question cannot run; nothing has been computed then.
    """
    asked = [place for place, question in enumerate(questions) if question.scored]
    results = completed(llm, [(questions[place].prompt, questions[place].params) for place in asked])
    unforced: list[tuple[int, list[TokenLogprob]]] = []
    for number, output in results:
        question = questions[asked[number]]
        entries = _of_prompt(output, question)
        [chosen] = output.outputs[0].logprobs or (None,) if question.forced else (None,)
        if chosen is not None and chosen.token_id != question.token_ids[-1]:
            unforced.append((asked[number], entries))
            continue
        yield asked[number], _score(entries if chosen is None else [*entries, chosen])
    for place, entries in unforced:
        yield place, _score([*entries, _alone(llm, questions[place].token_ids)])


def _of_prompt(output: RequestOutput, question: Question) -> list[TokenLogprob]:
    """What the prompt says of those tokens of the continuation that are in it."""
    count = question.scored - question.forced
    entries = [entry for entry in output.prompt_logprobs or () if entry is not None]
    return entries[len(entries) - count :] if count else []


def _alone(llm: LLM, token_ids: tuple[int, ...]) -> TokenLogprob:
    """The last token of a sequence whose logit is so far from the best one that no bias makes up for it."""
    logprobs_V = torch.log_softmax(llm.logits(token_ids[:-1])[-1], dim=-1)
    best = int(logprobs_V.argmax())
    token = token_ids[-1]
    return TokenLogprob(token_id=token, logprob=float(logprobs_V[token]), top=((best, float(logprobs_V[best])),))


def _score(entries: Sequence[TokenLogprob]) -> Score:
    return Score(
        logprob=math.fsum(entry.logprob for entry in entries),
        is_greedy=all(entry.top[0][0] == entry.token_id for entry in entries),
    )
