"""The prompts and conversations that a caller of `LLM` gives: one or several, checked and in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypedDict

from flexmoe.errors import DataError, UsageError
from flexmoe.openai.batch_line import read_messages
from flexmoe.params import SamplingParams
from policies.common.reading import without_nulls


class TextPrompt(TypedDict):
    """A text, as vLLM writes it."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids, as vLLM writes them."""

    prompt_token_ids: Sequence[int]


#: A text, or token ids.
Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
_GIVE = 'give a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
#: Of a prompt that is a dict; the last one names vLLM's cache of prompts, which changes nothing.
_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
#: Messages such as ``{"role": "user", "content": "…"}``.
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """One prompt.

    Args:
        text: as it was given; None for token ids alone.
        token_ids: None for a text, which is still to be tokenized.
    """

    text: str | None
    token_ids: tuple[int, ...] | None


def read_prompts(prompts: Prompt | Sequence[Prompt] | None) -> list[ReadPrompt]:
    """One prompt or several, as a list.

    Raises:
        UsageError: one is neither a text nor token ids.
    """
    if isinstance(prompts, (str, Mapping)):
        several: list[Any] = [prompts]
    elif isinstance(prompts, Iterable) and not isinstance(prompts, bytes):
        several = list(prompts)
        if several and isinstance(several[0], Integral):
            several = [several]
    else:
        raise UsageError(f"prompts is {prompts!r:.80}; {_GIVE}")
    return [_checked(index, prompt) for index, prompt in enumerate(several)]


def read_conversations(messages: Conversation | Sequence[Conversation]) -> list[tuple[dict[str, str], ...]]:
    """One conversation or several, as a list of checked ones.

    Raises:
        UsageError: it is no conversation, or has a part that is not supported.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Iterable):
        raise UsageError(f"messages is {messages!r:.80}; give a conversation, which is a list of messages, or several")
    several: list[Any] = list(messages)
    if several and isinstance(several[0], Mapping):
        several = [several]
    chats = []
    for index, chat in enumerate(several):
        try:
            read, errors = read_messages(without_nulls(list(chat) if isinstance(chat, (list, tuple)) else chat))
        except DataError as error:
            raise UsageError(f"conversation {index}: {error}") from None
        if errors:
            raise UsageError(f"conversation {index}: {errors[0].message}")
        chats.append(read)
    return chats


def one_each(sampling_params: SamplingParams | Sequence[SamplingParams], prompts: int) -> list[SamplingParams]:
    """The parameters of each prompt.

    Args:
        sampling_params: of all prompts, or one for each.

    Raises:
        UsageError: there are more or fewer than prompts, or they are something else.
    """
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * prompts
    each = list(sampling_params) if isinstance(sampling_params, Iterable) else [sampling_params]
    wrong = next((params for params in each if not isinstance(params, SamplingParams)), None)
    if wrong is not None or isinstance(sampling_params, Mapping):
        shown = sampling_params if isinstance(sampling_params, Mapping) else wrong
        raise UsageError(f"sampling_params is {shown!r:.80}; give SamplingParams, or a list with one per prompt")
    if len(each) != prompts:
        raise UsageError(f"{prompts} prompts but {len(each)} sampling parameters; give one per prompt")
    return each


def _checked(index: int, prompt: Any) -> ReadPrompt:
    """A text as it is, token ids as plain integers.

    Raises:
        UsageError: the prompt is neither.
    """
    text, ids = prompt, None
    if isinstance(prompt, Mapping):
        given = {key: value for key, value in prompt.items() if value is not None}
        unknown = given.keys() - _KEYS
        if unknown or not given.keys() & {"prompt", "prompt_token_ids"}:
            raise UsageError(f"prompt {index} has the keys {sorted(map(str, given))}; {_GIVE}")
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
    elif not isinstance(prompt, str):
        text, ids = None, prompt
    if isinstance(text, str) and ids is None:
        return ReadPrompt(text, None)
    if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)) and (text is None or isinstance(text, str)):
        found = list(ids)
        if set(map(type, found)) <= {int}:  # as nearly always; the test below takes a second for a million tokens
            return ReadPrompt(text, tuple(found))
        if all(isinstance(i, Integral) and not isinstance(i, bool) for i in found):
            return ReadPrompt(text, tuple(int(i) for i in found))
    raise UsageError(f"prompt {index} is {prompt!r:.80}; {_GIVE}")
