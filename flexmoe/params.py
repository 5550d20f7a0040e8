"""What a caller asks of the engine: plain frozen records, in the manner of vLLM's offline API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from flexmoe.errors import UsageError
from flexmoe.outputs import RequestOutput, TokenLogprob
from flexmoe.structured.asked import StructuredOutputsParams
from flexmoe.vllm_arguments import SAMPLING, only_ours

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
#: Tokens of a completion of a plain prompt without a limit. A chat without one may take the rest of the context.
DEFAULT_MAX_TOKENS = 32
#: Tokens that such a chat is expected to take, as long as nothing is known of its like: about the mean answer of chat models.
EXPECTED_NEW_TOKENS = 256
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 1024
#: Below this a temperature means the most probable token, as in vLLM.
GREEDY_BELOW = 1e-5


class WrongValueError(UsageError):
    """A field of `SamplingParams` with a value that it cannot have.

    Args:
        name: of the field.
        shown: its value.
        wanted: which values it can have.
    """

    def __init__(self, name: str, shown: str, wanted: str) -> None:
        super().__init__(f"{name} is {shown}; give {wanted}")
        self.name, self.wanted = name, wanted


class _TakesVllmNames(type):
    """Makes objects of vLLM's arguments: those that are not ours are left out or refused in a sentence."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
        if args:
            raise UsageError(f"{cls.__name__} takes its arguments by name: {', '.join(names)}")
        if given.get("best_of") == given.get("n", 1):
            given.pop("best_of", None)
        if not given.keys() <= set(names):
            given = only_ours(cls.__name__, given, names, SAMPLING)
        return super().__call__(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(metaclass=_TakesVllmNames):
    """How completions are chosen and when they end. The names and meanings are OpenAI's and vLLM's.

    A token is chosen in vLLM's order: logit bias and penalties, temperature, min_p, top_k, top_p. Log-probabilities
    are those of the model's own distribution, before any of it.

    Args:
        n: completions per prompt; they share the prompt's computation.
        temperature: 0 (or less than 1e-5) takes the most probable token, always.
        top_p: keep the most probable tokens whose probabilities sum to it; 1 keeps all.
        top_k: keep that many of the most probable tokens; 0 or -1 keeps all.
        min_p: keep the tokens at least this probable, relative to the most probable one; 0 keeps all.
        max_tokens: most tokens to generate, the end-of-sequence token included; None means `--gen-len` where that is given,
            else the rest of the context for a chat and 32 for `LLM.generate`; 0 generates nothing, for `echo` or
            `prompt_logprobs`.
        min_tokens: an end-of-sequence id and the ids of `stop_token_ids` are never chosen before so many were generated;
            stop strings count only where they end in the text of a later token. At most `max_tokens`.
        stop: strings that end the completion; the text is cut before the first of them.
        stop_token_ids: ids that end the completion as an end-of-sequence id does, even when `ignore_eos` is set.
        seed: of the random draws; None means the job's. A draw depends on it, the request's `stream_key`, the sample's
            index and the token's place in the completion alone.
        logprobs: report each token's log-probability and those of as many most probable tokens; None reports none.
        prompt_logprobs: the same for each token of the prompt but the first.
        presence_penalty: subtracted from the logits of tokens generated already.
        frequency_penalty: subtracted once for every time a token was generated.
        repetition_penalty: divides positive and multiplies negative logits of tokens of the prompt or generated.
        logit_bias: token id to what is added to its logit; kept as pairs sorted by id.
        ignore_eos: generate `max_tokens` although the model ends the sequence (for benchmarks).
        include_stop_str_in_output: keep in the text what ended it: the stop string, or the text of the id.
        detokenize: make the text; without it there is none, and no stop strings.
        skip_special_tokens: leave special tokens out of the text; stop strings see the text as it is made.
        echo: the caller will put the prompt before the completion; with `logprobs`, the prompt gets them too.
        structured_outputs: what the text has to look like, `StructuredOutputsParams` or its names and values. Tokens that cannot
            go on so are never chosen, and one that ends the sequence only where the text is complete; the completion ends where
            nothing else may follow, even before `min_tokens`.

    Raises:
        UsageError: a value of the wrong type or out of bounds.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] | Mapping[int, float] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    echo: bool = False
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_counts()
        self._number("temperature", 0, math.inf, "a finite number of at least 0")
        self._number("top_p", 0, 1, "a number above 0 and at most 1", above=True)
        self._number("min_p", 0, 1, "a number from 0 to 1")
        self._number("repetition_penalty", 0, math.inf, "a finite number above 0", above=True)
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, -MAX_PENALTY, MAX_PENALTY, f"a number from {-MAX_PENALTY:g} to {MAX_PENALTY:g}")
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise self._wrong(name, "True or False")
        self._set("stop", self._stops())
        self._set("stop_token_ids", self._stop_token_ids())
        self._set("logit_bias", self._bias())
        self._set("structured_outputs", self._structured())
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise UsageError("max_tokens is 0: nothing would be generated; give at least 1, or ask for echo")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise self._wrong("min_tokens", f"at most max_tokens, which is {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise UsageError("stop needs the text, and detokenize is False; set it to True, or give stop_token_ids")

    def limited(self, max_tokens: int) -> SamplingParams:
        """The same with this `max_tokens` where it has none.

        Raises:
            UsageError: it asks for more tokens than that (`min_tokens`).
        """
        return self if self.max_tokens is not None else replace(self, max_tokens=max_tokens)

    @property
    def biased_tokens(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept: token ids, each once and in order, with what is added to their logits."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """`structured_outputs` as it is kept."""
        return cast("StructuredOutputsParams | None", self.structured_outputs)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, so that nothing is drawn."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def penalized(self) -> bool:
        """Whether what was generated before changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1

    @property
    def scores_prompt(self) -> int | None:
        """As many most probable tokens as the prompt's log-probabilities come with; None where none are asked."""
        return self.logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs

    def _check_counts(self) -> None:
        required = {"n": (1, MAX_SAMPLES), "top_k": (-1, MAX_TOKENS), "min_tokens": (0, MAX_TOKENS)}
        optional = {"max_tokens": (0, MAX_TOKENS), "seed": (-(2**63), 2**63 - 1)}
        optional.update(dict.fromkeys(("logprobs", "prompt_logprobs"), (0, MAX_LOGPROBS)))
        for name, (least, most) in {**required, **optional}.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not (_is_int(value) and least <= value <= most):
                raise self._wrong(name, f"a whole number from {least} to {most}" + ", or None" * (name in optional))

    def _number(self, name: str, least: float, most: float, wanted: str, *, above: bool = False) -> None:
        value = _finite(getattr(self, name))
        if value is None or not least <= value <= most or (above and value == least):
            raise self._wrong(name, wanted)
        self._set(name, value)

    def _stops(self) -> tuple[str, ...]:
        stops = _or_empty(self.stop)
        stops = (stops,) if isinstance(stops, str) else stops
        if not isinstance(stops, (tuple, list)) or not all(isinstance(s, str) and s for s in stops):
            raise self._wrong("stop", "strings, none of them empty")
        if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in stops):
            raise self._wrong("stop", f"at most {MAX_STOPS} strings of at most {MAX_STOP_CHARACTERS} characters")
        return tuple(stops)

    def _stop_token_ids(self) -> tuple[int, ...]:
        stops = _or_empty(self.stop_token_ids)
        if not isinstance(stops, (tuple, list)) or not all(_is_int(i) and i >= 0 for i in stops):
            raise self._wrong("stop_token_ids", "token ids, none of them negative")
        if len(stops) > MAX_STOP_TOKENS:
            raise self._wrong("stop_token_ids", f"at most {MAX_STOP_TOKENS} of them")
        return tuple(stops)

    def _bias(self) -> tuple[tuple[int, float], ...]:
        given: Any = _or_empty(self.logit_bias)
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        if not isinstance(pairs, (tuple, list)) or len(pairs) > MAX_BIASED_TOKENS:
            raise self._wrong("logit_bias", f"at most {MAX_BIASED_TOKENS} token ids with their numbers")
        bias: dict[int, float] = {}
        token: Any
        for pair in pairs:
            token, value = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, None)
            number = _finite(value)
            if not _is_int(token) or token < 0 or token in bias or number is None or abs(number) > MAX_BIAS:
                raise self._wrong(
                    "logit_bias", f"token ids, each once, with numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}"
                )
            bias[token] = number
        return tuple(sorted(bias.items()))

    def _structured(self) -> StructuredOutputsParams | None:
        given: Any = self.structured_outputs
        if isinstance(given, Mapping):
            return StructuredOutputsParams.of(given)
        if not isinstance(given, (StructuredOutputsParams, type(None))):
            raise self._wrong("structured_outputs", "StructuredOutputsParams, or None")
        return given

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _wrong(self, name: str, wanted: str) -> UsageError:
        return WrongValueError(name, _show(getattr(self, name)), wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What was generated of one sample before a crash.

    Args:
        token_ids: the ids, possibly none, possibly all.
        logprobs: theirs, one for each id, where the request asks for logprobs; else None.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt as the engine takes it: token ids in, ``params.n`` completions out.

    Args:
        request_id: names the request among those in flight.
        stream_key: what the random draws depend on beside the seed; "" means the ``request_id``.
        resumed: per sample what was generated before a crash; (): nothing of any sample.
        prefix_ends: tokens of the prompt up to which other requests may begin alike, each a whole number of KV pages
            (`flexmoe.prefixes.finder`). Pages are shared only where the tokens are equal.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream_key: str = ""
    resumed: tuple[Resumed, ...] = ()
    prefix_ends: tuple[int, ...] = ()

    def failed(self, error: str, code: str = "engine_error") -> RequestOutput:
        """The result of this request where it cannot be completed.

        Args:
            error: why, as a sentence.
            code: what kind of failure it is.
        """
        return RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[],
            finished=True,
            error=error,
            error_code=code,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """What a sample of an unfinished request has generated so far, ended or not; `Resumed` takes it up again.

    Args:
        token_ids: the ids; a copy.
        logprobs: theirs, None where none are asked; the engine's own list, which keeps growing.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


def _or_empty(value: Any) -> Any:
    """vLLM's None for a list of nothing."""
    return () if value is None else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> float | None:
    """The value as a float; None where it is no finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e308 <= value <= 1e308:
        return None
    return float(value)


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a very large number"
    return text if len(text) <= 80 else f"{text[:77]}…"
