"""The prompts and conversations that a caller of `LLM` gives: one or several, checked and in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from flexmoe.errors import DataError, UsageError
from flexmoe.openai.batch_line import read_messages
from policies.common.reading import without_nulls

#: A text, or token ids.
Prompt = str | Sequence[int]
#: Messages such as ``{"role": "user", "content": "…"}``.
Conversation = Sequence[Mapping[str, Any]]


def read_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        UsageError: one is neither a text nor token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = list(prompts)
    if several and isinstance(several[0], Integral):
        several = [several]
    return [_checked(index, prompt) for index, prompt in enumerate(several)]


def read_conversations(messages: Conversation | Sequence[Conversation]) -> list[tuple[dict[str, str], ...]]:
    """One conversation or several, as a list of checked ones.

    Raises:
        UsageError: it is no conversation, or has a part that is not supported.
    """
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


def _checked(index: int, prompt: Prompt) -> Prompt:
    """A text as it is, token ids as plain integers.

    Raises:
        UsageError: the prompt is neither.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Iterable) and not isinstance(prompt, bytes):
        ids = list(prompt)
        if all(isinstance(i, Integral) and not isinstance(i, bool) for i in ids):
            return [int(i) for i in ids]
    raise UsageError(f"prompt {index} is {prompt!r:.80}; give a text or a list of token ids")
