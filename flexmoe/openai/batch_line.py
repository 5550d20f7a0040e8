"""One line of a requests file to one `Request`: OpenAI Batch lines and plain rows, strictly read.

There are two kinds of fault. **Structural**: the line cannot be understood as a request at all. It is not JSON or
not UTF-8, holds NaN, a key twice, or is too deep or too long; its method or url is another; its prompt or messages are
missing; a field has the wrong type; its `custom_id` is invalid or used twice. Such a line raises `InvalidLine`, so that
the job fails before it starts (or, where the user wants that, it becomes an error row). **Per row**: the line is
understood and cannot be served. A value is out of range, a field or a role is not supported, the prompt is too long, the
chat template refuses. The reason is a `RowError`; it becomes an error row, and the other rows run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from flexmoe.openai.fields import Fields, Kind, RowError, flag, read_fields
from flexmoe.openai.json_line import SCHEMA_FIELDS, InvalidLine, parse_json, show, token_ids
from flexmoe.openai.rendering import Rendering, read_rendering
from flexmoe.openai.shown_id import shown_id
from flexmoe.openai.structure import read_structure
from flexmoe.openai.tool_calls import functions_of
from policies.common.reading import without_nulls

Prompt = str | tuple[int, ...]
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
#: What messages of a role have beside role, content and name.
_MORE = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
#: OpenAI's newer name for the system's role; chat templates know the older one.
ALIASES = {"developer": "system"}
MAX_CUSTOM_ID_CHARACTERS = 512
URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
BATCH_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row of a job: one chat, or one or more prompts to complete.

    Args:
        line_number: 1-based place in the input.
        prompts: texts or token ids; empty for a chat.
        messages: the chat; None for completions.
        sampling: fields of `SamplingParams` that the row gives; the others are the job's.
        return_token_ids: put the ids beside the texts.
        rendering: how the prompt is written.
        prefix: text of a chat that comes before its completion.
        structure_field: that asks for structured output; "" for none.
        functions: calls of which are looked for in the answer (`functions_of`); None where there are no tools.
        model: as the row names it; None when it names none.
        error: why this row cannot run; None when it can.
    """

    custom_id: str
    line_number: int
    kind: Kind
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[Message, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    return_token_ids: bool = False
    rendering: Rendering = field(default_factory=Rendering)
    prefix: str = ""
    structure_field: str = ""
    functions: Mapping[str, frozenset[str]] | None = None
    model: str | None = None
    error: RowError | None = None

    @property
    def echo(self) -> bool:
        """Whether the prompt comes before the completion."""
        return bool(self.sampling.get("echo"))

    def without_prompt(self) -> Request:
        """What the row's output line needs; the prompts are kept only where they are echoed."""
        return replace(self, prompts=self.prompts if self.echo else (), messages=None, rendering=Rendering())


def parse_line(line: bytes, line_number: int) -> Request:
    """Parses one line of a requests file.

    Args:
        line: its bytes, not blank.
        line_number: 1-based, for the default `custom_id`.

    Raises:
        InvalidLine: the fault is structural; the sentence says what to change.
    """
    return request_of(read_object(line, lambda row: read_custom_id(row, line_number)), line_number)


def read_object(line: bytes, id_of: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    """The object of a line.

    Args:
        id_of: the id that an object gives itself, or `InvalidLine`.

    Raises:
        InvalidLine: there is no object that can be read; it carries the id that the line shows all the same.
    """
    try:
        value = parse_json(line)
    except InvalidLine as error:
        shown = shown_id(line)
        if shown is not None:
            with suppress(InvalidLine):
                error.custom_id = id_of({"custom_id": shown})
        raise
    if not isinstance(value, dict):
        raise InvalidLine(f"the line holds {show(value)}; write one JSON object per line")
    return value


def request_of(line: dict[str, Any], line_number: int) -> Request:
    """The request that the object of a line stands for. A field that is null is absent, here and in all that follows.

    Raises:
        InvalidLine: the fault is structural.
    """
    line = without_nulls(line, SCHEMA_FIELDS)
    custom_id = read_custom_id(line, line_number)
    try:
        return _request(line, line_number, custom_id)
    except InvalidLine as error:
        error.custom_id = custom_id
        raise


def read_custom_id(line: Mapping[str, Any], line_number: int) -> str:
    """The id that a line gives itself, or the one that its number gives it.

    Raises:
        InvalidLine: its id is no text, or too long.
    """
    custom_id = line.get("custom_id")
    if custom_id is None:
        return f"row-{line_number}"
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
        raise InvalidLine(
            f"custom_id is {show(custom_id)}; give a string of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters, or leave it out",
            param="custom_id",
        )
    return custom_id


def _request(line: dict[str, Any], line_number: int, custom_id: str) -> Request:
    is_batch = any(key in line for key in ("method", "url", "body"))
    body, kind = _batch_body(line) if is_batch else _plain_body(line)
    errors = [
        RowError.unsupported(key, f"the key {show(key)} beside body is not known; remove it")
        for key in line
        if is_batch and key not in BATCH_KEYS
    ]
    fields: Fields = read_fields(body, kind)
    errors += fields.errors
    structure_field, structure = read_structure(body, errors)
    sampling = fields.sampling if structure is None else fields.sampling | {"structured_outputs": structure}
    rendering = read_rendering(body, kind, errors)
    messages: tuple[Message, ...] | None = None
    prompts: tuple[Prompt, ...] = ()
    prefix = ""
    if kind == "chat":
        messages, refused = read_messages(body["messages"])
        errors += refused
        prefix = _echoed(messages, rendering) if flag(body, "echo") else ""
    else:
        prompts = read_prompts(body["prompt"])
    return Request(
        custom_id=custom_id,
        line_number=line_number,
        kind=kind,
        prompts=prompts,
        messages=messages,
        sampling=sampling,
        return_token_ids=fields.return_token_ids,
        rendering=rendering,
        prefix=prefix,
        structure_field=structure_field,
        functions=functions_of(rendering.tools) if rendering.tools else None,
        model=_model(body),
        error=RowError.joined(errors),
    )


def _batch_body(line: dict[str, Any]) -> tuple[dict[str, Any], Kind]:
    if line.get("method") != "POST":
        raise InvalidLine(f'method is {show(line.get("method"))}; it must be "POST"', param="method")
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str) or url not in URLS:
        raise InvalidLine(f"url is {show(url)}; supported are {' and '.join(URLS)}", param="url")
    if not isinstance(body, dict):
        raise InvalidLine(f"body is {show(body)}; it must be an object", param="body")
    wanted, other = ("messages", "prompt") if URLS[url] == "chat" else ("prompt", "messages")
    if wanted not in body:
        raise InvalidLine(f"body has no {wanted}, which {url} needs; add it", param=wanted)
    if other in body:
        raise InvalidLine(f"body has {other}, which {url} does not take; remove it or change the url", param=other)
    return body, URLS[url]


def _plain_body(line: dict[str, Any]) -> tuple[dict[str, Any], Kind]:
    if ("prompt" in line) == ("messages" in line):
        found = "both prompt and messages" if "prompt" in line else "neither prompt nor messages"
        raise InvalidLine(
            f"the row has {found}; give exactly one (or an OpenAI Batch line with method, url and body)", param="prompt"
        )
    body = {key: value for key, value in line.items() if key != "custom_id"}
    return body, "chat" if "messages" in line else "completion"


def read_prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A prompt in any of its four forms, as a tuple with one entry per prompt.

    Raises:
        InvalidLine: it has none of the four.
    """
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return tuple(prompt)
        if not any(isinstance(item, (str, list)) for item in prompt):
            return (token_ids(prompt, "prompt"),)
        if all(isinstance(item, list) and item for item in prompt):
            return tuple(token_ids(item, "prompt") for item in prompt)
    raise InvalidLine(
        f"prompt is {show(prompt)}; give a string, a list of strings, a list of token ids or a list of such lists, "
        "none of the lists empty",
        param="prompt",
    )


def _echoed(messages: tuple[Message, ...], rendering: Rendering) -> str:
    """What a chat with `echo` puts before its completion, as vLLM does: the last message, if the answer is of its role."""
    last = messages[-1]
    return last["content"] if last["role"] == "assistant" or not rendering.add_generation_prompt else ""


def _model(body: dict[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidLine(f"model is {show(model)}; give a string", param="model")
    return model


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
        given: str = message["role"]
        role = ALIASES.get(given, given)
        if role not in ROLES:
            problem = f"{name}.role = {show(role)} is not supported; use one of {', '.join((*ROLES, *ALIASES))}"
            errors.append(RowError.unsupported(f"{name}.role", problem))
        sender = message.get("name", "")
        if not isinstance(sender, str):
            raise InvalidLine(f"{name}.name is {show(sender)}; give a string", param=f"{name}.name")
        known = ("role", "content", "name", *_MORE.get(role, ()))
        extra = [key for key, value in message.items() if key not in known and value != []]
        errors += [RowError.unsupported(f"{name}.{key}", f"{name}.{key} is not supported; remove it") for key in extra]
        more = _tool_fields(message, role, name)
        text, error = _content(
            message.get("content"), f"{name}.content", optional=bool(extra or more.get("tool_calls"))
        )
        errors += [error] if error else []
        result.append({"role": role, "content": text} | ({"name": sender} if "name" in message else {}) | more)
    return tuple(result), errors


def _tool_fields(message: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    """What a message has of calls: those of an assistant, their arguments as objects for the template; or whose result it is."""
    more: dict[str, Any] = {}
    if role == "tool" and "tool_call_id" in message:
        if not isinstance(message["tool_call_id"], str):
            raise InvalidLine(f"{name}.tool_call_id is {show(message['tool_call_id'])}; give a string", param=name)
        more["tool_call_id"] = message["tool_call_id"]
    if role == "assistant" and message.get("tool_calls", []) != []:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise InvalidLine(f"{name}.tool_calls is {show(calls)}; give a list", param=f"{name}.tool_calls")
        more["tool_calls"] = [_called(call, f"{name}.tool_calls[{at}]") for at, call in enumerate(calls)]
    return more


def _called(call: Any, name: str) -> dict[str, Any]:
    """A call of an earlier answer.

    Raises:
        InvalidLine: it is none.
    """
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments", {}) if isinstance(function, dict) else None
    with suppress(ValueError):
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and isinstance(arguments, dict)):
        example = '{"id": "…", "type": "function", "function": {"name": "…", "arguments": "{…}"}}'
        raise InvalidLine(f"{name} is {show(call)}; give an object like {example}", param=name)
    return {**call, "function": {**function, "arguments": arguments}}


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
            problem = f"{name} has a part of type {show(part.get('type'))}; only text is supported"
            return "", RowError.unsupported(name, problem)
        if not isinstance(part.get("text"), str):
            raise InvalidLine(f"{name} has a text part without text; give its text as a string", param=name)
        texts.append(part["text"])
    return "\n".join(texts), None
