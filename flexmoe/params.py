"""What a caller asks of the engine and what comes back: plain frozen records, in the manner of vLLM's offline API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexmoe.errors import UsageError

FinishReason = Literal["stop", "length"]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a completion is chosen and when it ends. Sampling is greedy: the most probable token, always.

    Args:
        max_tokens: most tokens to generate, the end-of-sequence token included; None means the engine's
            default (`--gen-len`).
        ignore_eos: go on to `max_tokens` although the model ends the sequence (for benchmarks).
        stop_token_ids: ids that end the completion as an end-of-sequence id does, even when `ignore_eos` is set.

    Raises:
        UsageError: a value of the wrong type, or `max_tokens` below 1.
    """

    max_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and not (_is_int(self.max_tokens) and self.max_tokens >= 1):
            raise UsageError(f"max_tokens is {self.max_tokens!r}; give a whole number of at least 1, or None")
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos is {self.ignore_eos!r}; give True or False")
        stops = self.stop_token_ids
        if not isinstance(stops, (tuple, list)) or not all(_is_int(i) and i >= 0 for i in stops):
            raise UsageError(f"stop_token_ids is {stops!r}; give a tuple of token ids, none of them negative")
        object.__setattr__(self, "stop_token_ids", tuple(stops))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt as the engine takes it: token ids in, one completion out."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Args:
        index: place among the completions of its prompt.
        text: the decoded completion without the token that ended it; None when nothing decoded it.
        token_ids: every generated id, the one that ended the row included.
        finish_reason: "stop" when the last id is an end-of-sequence or stop id, else "length".
    """

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The result of one `EngineRequest`; `error` is a sentence when it failed, and `outputs` is then empty."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput]
    finished: bool
    error: str | None = None
