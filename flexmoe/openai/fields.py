"""The fields of a request beside its prompt: OpenAI's and vLLM's names to `SamplingParams`.

A field of the wrong type is a structural fault; one out of range, or one that is not supported, fails its row only.
Bounds are those of `SamplingParams`, which states them in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from flexmoe.errors import UsageError
from flexmoe.openai.json_line import InvalidLine, show, token_id_of, token_ids
from flexmoe.params import MAX_LOGPROBS, SamplingParams, WrongValueError
from policies.common.reading import whole

Kind = Literal["chat", "completion"]

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("n", "top_k", "seed", "min_tokens")
#: True or false, with what they are where a row does not say.
FLAGS = {"ignore_eos": False, "include_stop_str_in_output": False, "skip_special_tokens": True, "echo": False}
#: Two names of one limit; the second is OpenAI's newer one.
LIMITS = ("max_tokens", "max_completion_tokens")
OTHERS = (
    "logprobs",
    "top_logprobs",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "best_of",
    "return_token_ids",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "tools",
    "tool_choice",
    "model",
    "prompt",
    "messages",
)
#: They are OpenAI's and vLLM's housekeeping and change no completion.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
        "request_id",
        "cache_salt",
    }
)
#: Fields whose listed values ask for nothing; any other value is refused for the row.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "modalities": (["text"],),
    "documents": ([],),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
}
#: Those of which every value is refused.
NEUTRAL |= dict.fromkeys(
    ("audio", "prediction", "web_search_options", "moderation", "reasoning_effort", "verbosity"), ()
)
NEUTRAL |= dict.fromkeys(("prompt_logprobs", "allowed_token_ids", "truncate_prompt_tokens"), ())
KNOWN = frozenset((*NUMBERS, *INTEGERS, *FLAGS, *LIMITS, *OTHERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Why one row cannot run.

    Args:
        code: for programs.
        message: a sentence for people.
        param: the field at fault, where it is one.
    """

    code: str
    message: str
    param: str | None = None

    @classmethod
    def unsupported(cls, param: str, message: str) -> RowError:
        """A field, or a value of one, that this program does nothing with."""
        return cls(code="unsupported_field", message=message, param=param)

    @classmethod
    def invalid(cls, param: str, message: str) -> RowError:
        """A value out of range."""
        return cls(code="invalid_value", message=message, param=param)

    @classmethod
    def refused(cls, error: UsageError) -> RowError:
        """Values that `SamplingParams` refuses, each of which it may have by itself."""
        return cls(code="invalid_value", message=str(error), param=getattr(error, "name", None))

    @classmethod
    def joined(cls, errors: Sequence[RowError]) -> RowError | None:
        """All that is wrong with a row as one error, under the code and field of the first; None for nothing."""
        if not errors:
            return None
        return cls(code=errors[0].code, message="; ".join(e.message for e in errors), param=errors[0].param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """How a body wants its completions.

    Args:
        sampling: fields of `SamplingParams`, only those that are given.
        errors: why the row cannot run.
    """

    sampling: dict[str, Any]
    return_token_ids: bool
    errors: list[RowError]


def read_fields(body: Mapping[str, Any], kind: Kind) -> Fields:
    """Reads the fields that say how to complete a prompt, and refuses those that are not known.

    A body holds no null: it is read by `without_nulls` before.

    Raises:
        InvalidLine: a field has the wrong type.
    """
    errors = _unsupported(body)
    sampling: dict[str, Any] = {name: _number(body, name) for name in NUMBERS}
    sampling |= {name: _integer(body, name) for name in INTEGERS}
    sampling |= {"stop": _stop(body), "stop_token_ids": _stop_token_ids(body), "logit_bias": _logit_bias(body, errors)}
    sampling |= {"max_tokens": _limit(body, errors), "logprobs": _logprobs(body, kind, errors)}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    flags = {name: flag(body, name, default=default) for name, default in FLAGS.items()}
    # A chat is echoed in its answer alone: its prompt is not scored.
    sampling |= {
        name: on for name, on in flags.items() if on != FLAGS[name] and not (name == "echo" and kind == "chat")
    }
    best_of = _integer(body, "best_of")
    if best_of is not None and best_of != sampling.get("n", 1):
        errors.append(RowError.unsupported("best_of", f"best_of = {show(best_of)} is not supported; ask for n instead"))
    errors += _out_of_range(sampling, body)
    return Fields(
        sampling=sampling,
        return_token_ids=flag(body, "return_token_ids"),
        errors=errors,
    )


def _likely(key: str) -> str:
    """What was probably meant by a field that is not known."""
    close = get_close_matches(key, {*KNOWN, *NEUTRAL}, n=1)
    return f"did you mean {show(close[0])}?" if close else "remove it"


def _unsupported(body: Mapping[str, Any]) -> list[RowError]:
    errors = []
    for key, value in body.items():
        if key in KNOWN or key in HARMLESS:
            continue
        if key not in NEUTRAL:
            errors.append(RowError.unsupported(key, f"the field {show(key)} is not known; {_likely(key)}"))
        elif not any(_same(value, neutral) for neutral in NEUTRAL[key]):
            errors.append(RowError.unsupported(key, f"{key} = {show(value)} is not supported; leave it out"))
    return errors


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _out_of_range(sampling: dict[str, Any], body: Mapping[str, Any]) -> list[RowError]:
    """What `SamplingParams` refuses, each field by the name that the row gave it."""
    if not sampling:
        return []
    try:
        SamplingParams(**sampling)
        return []
    except UsageError as error:
        first = error
    errors = []
    for name, value in sampling.items():
        alone = {name: value} | ({"echo": True} if name == "max_tokens" and sampling.get("echo") else {})
        try:
            SamplingParams(**alone)
        except UsageError as error:
            given = _given_as(name, body)
            errors.append(RowError.invalid(given, _in_json(error, name, given, body)))
    return errors or [RowError.refused(first)]


def _in_json(error: UsageError, name: str, given: str, body: Mapping[str, Any]) -> str:
    """The sentence about a field, with its name, its value and null as the row has them, not as Python has."""
    if isinstance(error, WrongValueError):
        return f"{given} is {show(body[given])}; give {error.wanted.replace('None', 'null')}"
    return str(error).replace(name, given, 1)


def _given_as(name: str, body: Mapping[str, Any]) -> str:
    if name == "max_tokens" and body.get(name) is None:
        return "max_completion_tokens"
    return name


def _number(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
        raise InvalidLine(f"{name} is {show(value)}; give a number", param=name)
    return value


def _integer(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    number = whole(value)
    if value is not None and number is None:
        raise InvalidLine(f"{name} is {show(value)}; give a whole number", param=name)
    return number


def flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A field that is true or false.

    Raises:
        InvalidLine: it is neither.
    """
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise InvalidLine(f"{name} is {show(value)}; give true or false", param=name)
    return value


def _limit(body: Mapping[str, Any], errors: list[RowError]) -> int | None:
    limits = [value for name in LIMITS if (value := _integer(body, name)) is not None]
    if len(set(limits)) > 1:
        errors.append(RowError.invalid(LIMITS[0], "max_tokens and max_completion_tokens differ; give one of them"))
    return limits[0] if limits else None


def _logprobs(body: Mapping[str, Any], kind: Kind, errors: list[RowError]) -> int | None:
    """Alternatives to report beside each token; None to report nothing."""
    if kind == "completion":
        if body.get("top_logprobs") not in (None, 0):
            errors.append(RowError.unsupported("top_logprobs", "top_logprobs is for chats; give logprobs a number"))
        return None if body.get("logprobs") is False else _integer(body, "logprobs")
    wanted, top = flag(body, "logprobs"), _integer(body, "top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        message = f"top_logprobs is {show(top)}; give a whole number from 0 to {MAX_LOGPROBS}"
        errors.append(RowError.invalid("top_logprobs", message))
        return None
    if top and not wanted:
        errors.append(RowError.invalid("top_logprobs", "top_logprobs needs logprobs to be true; add it"))
    return (top or 0) if wanted else None


def _stop(body: Mapping[str, Any]) -> tuple[str, ...] | None:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops is not None and not (isinstance(stops, list) and all(isinstance(item, str) for item in stops)):
        raise InvalidLine(f"stop is {show(stop)}; give a string or a list of strings", param="stop")
    return None if stops is None else tuple(stops)


def _stop_token_ids(body: Mapping[str, Any]) -> tuple[int, ...] | None:
    stops = body.get("stop_token_ids")
    return None if stops is None else token_ids(stops, "stop_token_ids")


def _logit_bias(body: Mapping[str, Any], errors: list[RowError]) -> dict[int, float] | None:
    """Keys of JSON objects are strings: here they hold token ids."""
    given = body.get("logit_bias")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InvalidLine(f"logit_bias is {show(given)}; give an object of token ids and numbers", param="logit_bias")
    bias: dict[int, float] = {}
    for key, value in given.items():
        token = token_id_of(key)
        if token is None or not isinstance(value, (int, float)) or isinstance(value, bool):
            message = f"logit_bias holds {show({key: value})}; its keys are token ids and its values numbers"
            raise InvalidLine(message, param="logit_bias")
        if token in bias:
            errors.append(RowError.invalid("logit_bias", f"logit_bias names the token {token} twice; keep one"))
        bias[token] = value
    return bias
