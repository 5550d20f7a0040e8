"""The messages of a chat, as plain roles and texts."""

from __future__ import annotations

from typing import Any

from flexmoe.openai.fields import RowError
from flexmoe.openai.json_line import InvalidLine, show

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
#: OpenAI's newer name for the system's role; chat templates know the older one.
ALIASES = {"developer": "system"}


def read_messages(messages: Any) -> tuple[tuple[Message, ...], list[RowError]]:
    """The chat with its contents as plain text, and why it cannot run.

    Raises:
        InvalidLine: it is no list of messages.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidLine(f"messages is {show(messages)}; give a list of at least one message", param="messages")
    result: list[Message] = []
    errors: list[RowError] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidLine(
                f'{name} is {show(message)}; give an object like {{"role": "user", "content": "…"}}', param=name
            )
        role = ALIASES.get(message["role"], message["role"])
        if role not in ROLES:
            told = f"{name}.role = {show(role)} is not supported; use one of {', '.join((*ROLES, *ALIASES))}"
            errors.append(RowError.unsupported(f"{name}.role", told))
        extra = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, [])]
        errors += [RowError.unsupported(f"{name}.{key}", f"{name}.{key} is not supported; remove it") for key in extra]
        text, error = _content(message.get("content"), f"{name}.content", optional=bool(extra))
        errors += [error] if error else []
        result.append({"role": role, "content": text})
    return tuple(result), errors


def _content(content: Any, name: str, *, optional: bool) -> tuple[str, RowError | None]:
    """Text of a message; a list of text parts is joined by line breaks, as vLLM does."""
    if isinstance(content, str):
        return content, None
    if content is None and optional:
        return "", None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InvalidLine(f"{name} is {show(content)}; give a string or a list of text parts", param=name)
    texts = []
    for part in content:
        if part.get("type") != "text":
            told = f"{name} has a part of type {show(part.get('type'))}; only text is supported"
            return "", RowError.unsupported(name, told)
        if not isinstance(part.get("text"), str):
            raise InvalidLine(f"{name} has a text part without text; give its text as a string", param=name)
        texts.append(part["text"])
    return "\n".join(texts), None
