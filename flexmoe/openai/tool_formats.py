"""How families of models write that they call a function: from the text behind a mark to names and arguments.

Formats are those of the models' chat templates; vLLM's `tool_parsers` are the source for names and for what is forgiven.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Names of functions, each with the names of its arguments that are texts by their schema.
Functions = Mapping[str, frozenset[str]]
Found = Iterator[tuple[str, Any]]

_DECODER = json.JSONDecoder()
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_CODER_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|$)", re.DOTALL)
_CODER_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)
_INVOKE = re.compile(r'<invoke name="?([^">]+)"?>(.*?)(?:</invoke>|$)', re.DOTALL)
_INVOKE_ARGUMENT = re.compile(r'<parameter name="?([^">]+)"?>(.*?)</parameter>', re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_HARMONY_CALL = re.compile(
    r"to=functions\.([\w.-]+)(?:(?!<\|message\|>).)*<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|<\|start\|>|$)", re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way of writing calls.

    Args:
        mark: with which the calls begin; "" where nothing does: the whole answer is a call.
        evidence: what a chat template has whose model writes so.
        read: the calls in what stands from the mark on, with their arguments; `ValueError` where it cannot be read.
    """

    mark: str
    evidence: str
    read: Callable[[str, Functions], Found]


def _from_json(value: Any) -> Found:
    """Calls as JSON objects, one or a list of them."""
    for each in value if isinstance(value, list) else [value]:
        name = each.get("name") if isinstance(each, dict) else None
        arguments = each.get("arguments", each.get("parameters", {})) if isinstance(each, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
            raise ValueError("no call")
        yield name, json.loads(arguments) if isinstance(arguments, str) else arguments


def _decoded(text: str) -> Any:
    """The JSON value with which a text begins."""
    return _DECODER.raw_decode(text.lstrip())[0]


def _typed(function: str, pairs: list[tuple[str, str]], functions: Functions, *, trim: bool) -> dict[str, Any]:
    """Arguments that are written as text: JSON, unless their schema says that they are texts, or they are none."""
    arguments: dict[str, Any] = {}
    for name, text in pairs:
        value: Any = text.removeprefix("\n").removesuffix("\n") if trim else text
        if name.strip() not in functions.get(function, ()):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        arguments[name.strip()] = value
    return arguments


def _tool_call_tags(text: str, functions: Functions) -> Found:
    """Between `<tool_call>` tags: JSON (Hermes, Qwen, Ernie), functions in tags (Qwen3-Coder), or a name with its arguments
    in tags (GLM) or as JSON (Hunyuan)."""
    for piece in text.split("<tool_call>")[1:]:
        body = piece.partition("</tool_call>")[0].strip()
        if body[:1] in ("{", "["):
            yield from _from_json(_decoded(body))
        elif body.startswith("<function="):
            for name, inner in _CODER_FUNCTION.findall(body):
                yield name, _typed(name, _CODER_ARGUMENT.findall(inner), functions, trim=True)
        else:
            yield _named(body, functions)


def _named(body: str, functions: Functions) -> tuple[str, Any]:
    name = re.split(r"[\n<{`]", body, maxsplit=1)[0].strip()
    pairs = _GLM_ARGUMENT.findall(body)
    if not name:
        raise ValueError("no name")
    if pairs or "{" not in body:
        return name, _typed(name, pairs, functions, trim=False)
    return name, _decoded(body[body.index("{") :])


def _invocations(text: str, functions: Functions) -> Found:
    """MiniMax-M2."""
    for name, inner in _INVOKE.findall(text):
        yield name, _typed(name, _INVOKE_ARGUMENT.findall(inner), functions, trim=True)


def _mistral(text: str, functions: Functions) -> Found:
    """A JSON list, or names each with its arguments."""
    for piece in text.split("[TOOL_CALLS]")[1:]:
        rest = piece.strip()
        if rest.startswith("["):
            yield from _from_json(_decoded(rest))
            continue
        while named := _MISTRAL_CALL.match(rest):
            arguments, end = _DECODER.raw_decode(rest[named.end() :])
            yield named[1], arguments
            rest = rest[named.end() + end :]


def _granite(text: str, functions: Functions) -> Found:
    yield from _from_json(_decoded(text.partition("<|tool_call|>")[2]))


def _harmony(text: str, functions: Functions) -> Found:
    """gpt-oss: messages to `functions.…`, in whichever channel."""
    for name, body in _HARMONY_CALL.findall(text):
        yield name, _decoded(body)


def _bare(text: str, functions: Functions) -> Found:
    """Llama 3: the answer is JSON, several calls are divided by semicolons."""
    rest = text.strip().removeprefix("<|python_tag|>")
    while rest:
        value, end = _DECODER.raw_decode(rest)
        yield from _from_json(value)
        rest = rest[end:].lstrip(" ;\n")


#: The first whose evidence a chat template has, or whose mark is a token.
FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(mark="to=functions.", evidence="to=functions.", read=_harmony),
    ToolFormat(mark="<minimax:tool_call>", evidence="<minimax:tool_call>", read=_invocations),
    ToolFormat(mark="[TOOL_CALLS]", evidence="[TOOL_CALLS]", read=_mistral),
    ToolFormat(mark="<|tool_call|>", evidence="<|tool_call|>", read=_granite),
    ToolFormat(mark="<tool_call>", evidence="<tool_call>", read=_tool_call_tags),
    ToolFormat(mark="", evidence="ipython", read=_bare),
)
