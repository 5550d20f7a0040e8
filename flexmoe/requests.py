"""One line of a requests file to one `Request`: OpenAI Batch lines and plain rows, strictly read.

Two kinds of fault are told apart. A line that is malformed (not JSON, a prompt of the wrong type, a `custom_id` used
twice) raises `DataError`, so that the job fails before it starts. A line that is well formed and asks for something
this engine does not do (sampling, tools, a field nobody knows) carries the reason in `Request.error`; it becomes an
error row and the other rows run. Sampling is greedy: an absent `temperature` means 0 here, not OpenAI's 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from flexmoe.errors import DataError
from flexmoe.params import SamplingParams
from policies import strict_json

Kind = Literal["chat", "completion"]
Prompt = str | tuple[int, ...]

MAX_LINE_BYTES = 64 * 2**20
MAX_INT = 2**31 - 1
URLS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
ROLES = ("system", "user", "assistant")
BATCH_KEYS = ("custom_id", "method", "url", "body")
USED_FIELDS = frozenset({
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "ignore_eos", "stop_token_ids",
    "return_token_ids",
})  # fmt: skip
# They cannot change a greedy completion.
HARMLESS_FIELDS = frozenset({"seed", "user", "metadata", "store"})
# Fields whose listed values ask for nothing; any other value is refused for the row.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 0), "top_p": (None, 1), "top_k": (None, -1, 0, 1), "min_p": (None, 0), "n": (None, 1),
    "best_of": (None, 1), "stream": (None, False), "stream_options": (None,), "stop": (None, []),
    "tools": (None, []), "tool_choice": (None, "none"), "functions": (None, []), "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}), "logprobs": (None, False), "top_logprobs": (None, 0),
    "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1), "echo": (None, False), "suffix": (None, ""),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row of a job: one chat, or one or more prompts to complete (a choice each).

    Args:
        prompts: texts or token ids; empty for a chat.
        messages: the chat as {"role", "content"} pairs; None for completions.
        error: why this row cannot run, naming the field; None when it can.
    """

    custom_id: str
    line_number: int
    kind: Kind
    prompts: tuple[Prompt, ...]
    messages: tuple[dict[str, str], ...] | None
    params: SamplingParams
    return_token_ids: bool
    model: str | None
    error: str | None = None


def parse_line(line: bytes, line_number: int) -> Request | None:
    """Parses one line of a requests file.

    Args:
        line: the bytes of the line, with or without its line end.
        line_number: 1-based, for messages and for the default `custom_id`.

    Returns:
        The request, or None for a blank line.

    Raises:
        DataError: the line is malformed; the sentence says where and what to change.
    """
    if line_number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    try:
        return _request(_strict_json(line), line_number)
    except DataError as error:
        raise DataError(f"line {line_number}: {error}") from None


def _strict_json(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"the line is longer than {MAX_LINE_BYTES} bytes; put one request on each line")
    try:
        value = strict_json.parse(line)
        # A lone surrogate (\ud800) is legal JSON but no text: neither a tokenizer nor the output file could hold it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except strict_json.RepeatedKeyError as error:
        raise DataError(f"the key {show(error.keys[0])} is given twice in one object; keep one") from None
    except strict_json.NotFiniteError as error:
        if error.literal in ("NaN", "Infinity", "-Infinity"):
            raise DataError(f"{error.literal} is not JSON; write a number or null") from None
        raise DataError(f"the number {error.literal[:40]} is out of range; write a smaller one") from None
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise DataError("a string holds half of a surrogate pair (\\ud800 to \\udfff); remove it") from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply; a request needs only a few levels") from None
    except ValueError as error:
        raise DataError(f"not valid JSON ({error}); write one JSON object per line") from None
    return value


def _request(line: Any, line_number: int) -> Request:
    if not isinstance(line, dict):
        raise DataError(f"the line holds {show(line)}; write one JSON object per line")
    is_batch = any(key in line for key in ("method", "url", "body"))
    body, kind = _batch_body(line) if is_batch else _plain_body(line)
    custom_id = line.get("custom_id")
    if custom_id is None:
        custom_id = f"row-{line_number}"
    if not isinstance(custom_id, str) or not custom_id:
        raise DataError(f"custom_id is {show(custom_id)}; give a string that is not empty, or leave it out")
    reasons = [f"the key {show(key)} beside body is not known" for key in line if is_batch and key not in BATCH_KEYS]
    reasons += _unsupported_fields(body)
    messages: tuple[dict[str, str], ...] | None = None
    if kind == "chat":
        messages, reason = _messages(body["messages"])
        reasons += [reason] if reason else []
    return Request(
        custom_id=custom_id,
        line_number=line_number,
        kind=kind,
        prompts=() if kind == "chat" else _prompts(body["prompt"]),
        messages=messages,
        params=_params(body),
        return_token_ids=_flag(body, "return_token_ids"),
        model=_model(body),
        error="; ".join(reasons) or None,
    )


def _batch_body(line: dict[str, Any]) -> tuple[dict[str, Any], Kind]:
    if line.get("method") != "POST":
        raise DataError(f'method is {show(line.get("method"))}; it must be "POST"')
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str) or url not in URLS:
        raise DataError(f"url is {show(url)}; supported are {' and '.join(URLS)}")
    if not isinstance(body, dict):
        raise DataError(f"body is {show(body)}; it must be an object")
    wanted, other = ("messages", "prompt") if URLS[url] == "chat" else ("prompt", "messages")
    if wanted not in body:
        raise DataError(f"body has no {wanted}, which {url} needs; add it")
    if other in body:
        raise DataError(f"body has {other}, which {url} does not take; remove it or change the url")
    return body, URLS[url]


def _plain_body(line: dict[str, Any]) -> tuple[dict[str, Any], Kind]:
    if ("prompt" in line) == ("messages" in line):
        found = "both prompt and messages" if "prompt" in line else "neither prompt nor messages"
        raise DataError(f"the row has {found}; give exactly one (or an OpenAI Batch line with method, url and body)")
    body = {key: value for key, value in line.items() if key != "custom_id"}
    return body, "chat" if "messages" in line else "completion"


def _unsupported_fields(body: dict[str, Any]) -> list[str]:
    reasons = []
    for key, value in body.items():
        if key in USED_FIELDS or key in HARMLESS_FIELDS:
            continue
        if key not in NEUTRAL_VALUES:
            reasons.append(f"the field {show(key)} is not known; remove it")
        elif not any(_same(value, neutral) for neutral in NEUTRAL_VALUES[key]):
            hint = " (decoding is greedy)" if key in ("temperature", "top_p", "top_k", "min_p", "n", "best_of") else ""
            reasons.append(f"{key} = {show(value)} is not supported{hint}; leave it out")
    return reasons


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    """A prompt in any of its four forms, as a tuple with one entry per choice."""
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return tuple(prompt)
        if not any(isinstance(item, (str, list)) for item in prompt):
            return (_token_ids(prompt, "prompt"),)
        if all(isinstance(item, list) and item for item in prompt):
            return tuple(_token_ids(item, "prompt") for item in prompt)
    raise DataError(
        f"prompt is {show(prompt)}; give a string, a list of strings, a list of token ids or a list of such lists, "
        "none of the lists empty"
    )


def _token_ids(items: Any, name: str) -> tuple[int, ...]:
    if not isinstance(items, list):
        raise DataError(f"{name} is {show(items)}; give a list of token ids")
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= MAX_INT:
            raise DataError(f"{name} holds {show(item)}, which is no token id; ids are whole numbers from 0")
    return tuple(items)


def _messages(messages: Any) -> tuple[tuple[dict[str, str], ...], str | None]:
    """The chat with its contents as plain text, and why it cannot run (or None)."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages is {show(messages)}; give a list of at least one message")
    result, reasons = [], []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{name} is {show(message)}; give an object like {{"role": "user", "content": "…"}}')
        if message["role"] not in ROLES:
            reasons.append(f"{name}.role = {show(message['role'])} is not supported; use one of {', '.join(ROLES)}")
        extra = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, [])]
        reasons += [f"{name}.{key} is not supported; remove it" for key in extra]
        text, reason = _content(message.get("content"), f"{name}.content", optional=bool(extra))
        reasons += [reason] if reason else []
        result.append({"role": message["role"], "content": text})
    return tuple(result), "; ".join(reasons) or None


def _content(content: Any, name: str, *, optional: bool) -> tuple[str, str | None]:
    """Text of a message; a list of text parts is joined by line breaks, as vLLM does."""
    if isinstance(content, str):
        return content, None
    if content is None and optional:
        return "", None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"{name} is {show(content)}; give a string or a list of text parts")
    texts = []
    for part in content:
        if part.get("type") != "text":
            return "", f"{name} has a part of type {show(part.get('type'))}; only text is supported"
        if not isinstance(part.get("text"), str):
            raise DataError(f"{name} has a text part without text; give its text as a string")
        texts.append(part["text"])
    return "\n".join(texts), None


def _params(body: dict[str, Any]) -> SamplingParams:
    limits = {}
    for key in ("max_tokens", "max_completion_tokens"):
        value = body.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_INT:
            raise DataError(f"{key} is {show(value)}; give a whole number from 1 to {MAX_INT}, or leave it out")
        limits[key] = value
    if len(set(limits.values())) > 1:
        raise DataError("max_tokens and max_completion_tokens differ; give one of them")
    stops = body.get("stop_token_ids")
    return SamplingParams(
        max_tokens=next(iter(limits.values()), None),
        ignore_eos=_flag(body, "ignore_eos"),
        stop_token_ids=() if stops is None else _token_ids(stops, "stop_token_ids"),
    )


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{key} is {show(value)}; give true or false")
    return bool(value)


def _model(body: dict[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise DataError(f"model is {show(model)}; give a string")
    return model


def show(value: Any) -> str:
    """A value as an error sentence quotes it: as JSON, and short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # an int of more digits than Python prints
        return "a very large number"
    return text if len(text) <= 80 else f"{text[:77]}…"
