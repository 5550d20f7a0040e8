"""What comes back of a request: completions with their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One entry of a `TokenLogprob`, as in vLLM.

    Args:
        rank: place among the most probable tokens, from 1; None for a token that is not among those that were asked for.
        decoded_token: the token's text by itself; None where nothing decoded it.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob(Mapping[int, Logprob]):
    """Log-probability of one token under the model's own distribution; also a mapping from ids to `Logprob`, as in vLLM:
    the token that stands there first, then the most probable ones.

    Args:
        token_id: the token that stands there, chosen or given.
        logprob: its natural log-probability.
        top: the most probable ids with theirs, the best first, equal ones by lower id; whether or not ``token_id`` is
            among them.
        texts: of the ids, each by itself; None where nothing decoded them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    texts: Mapping[int, str] | None = field(default=None, compare=False)

    def __iter__(self) -> Iterator[int]:
        yield self.token_id
        yield from (token for token, _ in self.top if token != self.token_id)

    def __len__(self) -> int:
        return 1 + sum(token != self.token_id for token, _ in self.top)

    def __getitem__(self, token_id: int) -> Logprob:
        text = None if self.texts is None else self.texts.get(token_id)
        for rank, (token, logprob) in enumerate(self.top, start=1):
            if token == token_id:
                return Logprob(logprob=logprob, rank=rank, decoded_token=text)
        if token_id != self.token_id:
            raise KeyError(token_id)
        return Logprob(logprob=self.logprob, rank=None, decoded_token=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: place among the completions of its prompt.
        text: the decoded completion, without the token or the string that ended it unless they are asked for; None when
            nothing decoded it.
        token_ids: every generated id, those that ended the completion included.
        finish_reason: "stop" when an end-of-sequence id, a stop id or a stop string ended it, else "length".
        stop_reason: the stop string or the stop id that ended it; None for an end-of-sequence id and for length.
        logprobs: one for each of ``token_ids``; None where the request asks for none.
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the tokens' log-probabilities; None where none are asked."""
        return None if self.logprobs is None else math.fsum(entry.logprob for entry in self.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The result of one `EngineRequest`; `error` is a sentence when it failed, and `outputs` is then empty.

    Args:
        error_code: what kind of failure it is, "non_finite_logits" or "engine_error"; None where there is none.
        outputs: the ``n`` completions, by index. A request of ``max_tokens`` 0 has them too, with no tokens.
        prompt_logprobs: one for each token of the prompt but the first; None where the request asks for none. From
            `LLM.generate` and `LLM.chat` the first token has one too, which is None.
        num_cached_tokens: tokens of the prompt that were not computed for it, since other rows begin alike; None where it did
            not run.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
    error_code: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int | None = None

    @property
    def metrics(self) -> None:
        """Times of this request: there are none, as in vLLM without statistics; `LLM.metrics` has those of all."""
        return None
