"""The calls of functions in a completion, taken apart from the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.openai.reasoning import CLOSE
from flexmoe.openai.tool_formats import FORMATS, Functions, ToolFormat
from flexmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call.

    Args:
        arguments: a JSON object as text.
    """

    name: str
    arguments: str

    def to_json(self, key: str) -> dict[str, Any]:
        """As OpenAI's answers have it.

        Args:
            key: what makes its id; the same for the same call of the same job.
        """
        id = f"call_{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        return {"id": id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Of OpenAI's list of tools what reading calls of them needs."""
    return {tool["function"]["name"]: _texts(tool["function"].get("parameters", {})) for tool in tools}


def _texts(schema: Mapping[str, Any]) -> frozenset[str]:
    properties = schema.get("properties")
    some = properties.items() if isinstance(properties, Mapping) else ()
    return frozenset(name for name, each in some if isinstance(each, Mapping) and each.get("type") == "string")


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """How a model writes calls; None for one that is not known to."""
    template = tokenizer.chat_template or ""
    for each in FORMATS:
        if each.evidence in template or (each.mark and tokenizer.token_id(each.mark) is not None):
            return each
    return None


class ToolParser:
    """Finds calls in completions.

    Args:
        tokenizer: of the model.

    Attributes:
        format: how the model writes calls; None where that is not known, and nothing is found.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.format = format_of(tokenizer)
        self._mark_id = tokenizer.token_id(self.format.mark) if self.format is not None and self.format.mark else None

    def split(
        self, token_ids: Sequence[int], content: str | None, functions: Functions
    ) -> tuple[str | None, list[ToolCall]]:
        """A completion's content before its calls, and the calls.

        Args:
            token_ids: all ids of the completion: marks may be special tokens, which texts leave out.
            content: the text of its answer; None for none.
            functions: that may be called.

        Returns:
            The content as it is, and no calls, where there are none or they cannot be read.
        """
        decode = self._tokenizer.detokenize
        if self.format is None or decode is None:
            return content, []
        raw = content if not self.format.mark else decode(token_ids, skip_special_tokens=False)
        raw = (raw or "").rpartition(CLOSE)[2]
        at = raw.find(self.format.mark)
        if at < 0 or not raw:
            return content, []
        try:
            found = [_call(name, arguments) for name, arguments in self.format.read(raw[at:], functions)]
        except (ValueError, RecursionError):
            return content, []
        if not found:
            return content, []
        return self.before(token_ids, content or "") or None, found

    def before(self, token_ids: Sequence[int], content: str) -> str:
        """The part of a content before what is a call, or may become one when more tokens come."""
        if self.format is None:
            return content
        mark, decode = self.format.mark, self._tokenizer.detokenize
        if not mark:
            return "" if content.lstrip().startswith("{") else content
        if mark in content:
            return content[: content.index(mark)].rstrip()
        if self._mark_id is not None and self._mark_id in token_ids and decode is not None:
            hidden = decode(token_ids[list(token_ids).index(self._mark_id) + 1 :])
            return content[: max(0, len(content) - len(hidden))].rstrip()
        begun = next((n for n in range(len(mark) - 1, 0, -1) if content.endswith(mark[:n])), 0)
        return content[: len(content) - begun].rstrip()


def _call(name: str, arguments: Any) -> ToolCall:
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
