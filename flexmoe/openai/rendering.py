"""The fields of a request that say how its prompt is written, before any token is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.openai.fields import Kind, RowError, flag
from flexmoe.openai.json_line import InvalidLine, show

#: Variables that the chat template gets from elsewhere.
_TEMPLATE_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How a prompt is written; the names and meanings are vLLM's.

    Args:
        template_kwargs: more variables for the chat template.
        add_generation_prompt: end a chat with what begins the assistant's answer.
        continue_final_message: leave the last message of a chat open, so that the completion continues it.
        add_special_tokens: whether the tokenizer adds its own, such as BOS; None for what suits: it does to prompts, and
            not to chats, whose template writes them.
        tools: that the chat template describes; what a model calls of them is looked for in its answer.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


def read_rendering(body: Mapping[str, Any], kind: Kind, errors: list[RowError]) -> Rendering:
    """Reads these fields of a body; `errors` gets why the row cannot run.

    Raises:
        InvalidLine: a field has the wrong type.
    """
    opened = flag(body, "add_generation_prompt", default=True)
    continued = flag(body, "continue_final_message")
    if kind == "chat" and opened and continued:
        message = "continue_final_message and add_generation_prompt (default true) exclude each other; give the latter as false"
        errors.append(RowError.invalid("continue_final_message", message))
    if kind != "chat":
        asked = {"add_generation_prompt": not opened, "continue_final_message": continued}
        asked["chat_template_kwargs"] = "chat_template_kwargs" in body
        errors += [
            RowError.unsupported(name, f"{name} is for chats only; leave it out") for name in asked if asked[name]
        ]
    return Rendering(
        template_kwargs=_template_kwargs(body, errors),
        add_generation_prompt=opened,
        continue_final_message=continued,
        add_special_tokens=flag(body, "add_special_tokens") if "add_special_tokens" in body else None,
        tools=_tools(body, kind, errors),
    )


def _tools(body: Mapping[str, Any], kind: Kind, errors: list[RowError]) -> tuple[Mapping[str, Any], ...]:
    """The functions that a model may call; none where `tool_choice` says that it shall call none."""
    if kind != "chat" and body.get("tools"):
        errors.append(RowError.unsupported("tools", "tools are for chats only; leave them out"))
        return ()
    try:
        tools = read_tools(body.get("tools", []))
    except UsageError as error:
        errors.append(RowError.invalid("tools", str(error)))
        return ()
    choice = body.get("tool_choice", "auto")
    if choice not in ("none", "auto"):
        errors.append(
            RowError.unsupported("tool_choice", f"tool_choice = {show(choice)} is not supported; give none or auto")
        )
    return tools if choice == "auto" else ()


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """OpenAI's list of functions.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(tools, (list, tuple)):
        raise UsageError(f"tools is {show(tools)}; give a list of functions")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not (isinstance(function.get("name"), str) and function["name"]):
            example = '{"type": "function", "function": {"name": "…", "parameters": {…}}}'
            raise UsageError(f"tools[{index}] is {show(tool)}; give an object like {example}")
        if not isinstance(function.get("parameters", {}), Mapping):
            raise UsageError(
                f"tools[{index}].function.parameters is {show(function['parameters'])}; give a JSON Schema"
            )
    return tuple(tools)


def _template_kwargs(body: Mapping[str, Any], errors: list[RowError]) -> dict[str, Any]:
    name = "chat_template_kwargs"
    kwargs = body.get(name, {})
    if not isinstance(kwargs, dict):
        raise InvalidLine(f"{name} is {show(kwargs)}; give an object", param=name)
    taken = [key for key in kwargs if key in _TEMPLATE_NAMES]
    errors += [RowError.unsupported(f"{name}.{key}", f"{name}.{key} is not supported; leave it out") for key in taken]
    return kwargs
