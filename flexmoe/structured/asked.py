"""What a completion has to look like, as a request asks for it: vLLM's `StructuredOutputsParams`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from flexmoe.errors import UsageError
from flexmoe.vllm_arguments import STRUCTURED, only_ours

Kind = Literal["json", "regex", "choice", "grammar", "json_object"]
#: One of these says what the text is.
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHARACTERS = 2**20
MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What a completion has to look like; exactly one of the first five. The names and meanings are vLLM's.

    Args:
        json: a JSON Schema, as an object or as its text (kept as text); the completion is JSON that is valid against it.
        regex: a regular expression that matches the whole completion, in the syntax of Rust's `regex` without look-around.
        choice: texts, one of which the completion is.
        grammar: a context-free grammar, in llguidance's Lark or in llama.cpp's GBNF.
        json_object: the completion is a JSON object.
        disable_any_whitespace: JSON has no whitespace outside its strings.
        whitespace_pattern: a regular expression of the whitespace between two tokens of JSON; default: at most one space, or a
            line break with indentation.

    Raises:
        UsageError: none or several are given, or a value of the wrong type.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [
            name
            for name in KINDS
            if getattr(self, name) not in (None, False) or (name == "json" and self.json is False)
        ]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise UsageError(f"structured_outputs gives {found}; give exactly one of {', '.join(KINDS)}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_CHARACTERS):
                raise UsageError(
                    f"structured_outputs.{name} is {value!r:.80}; give a text of 1 to {MAX_CHARACTERS} characters"
                )
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise UsageError(f"structured_outputs.{name} is {getattr(self, name)!r:.80}; give True or False")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> StructuredOutputsParams:
        """From names and values, as a row of a file has them.

        Raises:
            UsageError: a name is not known, or as the class.
        """
        ours = [each.name for each in fields(cls)]
        return cls(**only_ours("structured_outputs", given, ours, STRUCTURED))

    @property
    def kind(self) -> Kind:
        """Which of the five is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def schema(self) -> str:
        """The text of the JSON Schema; for `json_object` that of any object.

        Raises:
            ValueError: there is none.
        """
        if self.json_object:
            return '{"type": "object"}'
        if not isinstance(self.json, str):
            raise ValueError(f"a {self.kind} has no schema")
        return self.json


def _schema_text(given: Any) -> str:
    """A schema as text, its keys in the order in which they are given: that of the properties in the completion."""
    name = "structured_outputs.json"
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{name} is no JSON Schema: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise UsageError(f"{name} is {text:.80}; give a JSON Schema, which is an object")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"{name} has {len(text)} characters; at most {MAX_CHARACTERS} are taken")
    return text


def _choices(given: Any) -> tuple[str, ...]:
    several = isinstance(given, (list, tuple)) and 0 < len(given) <= MAX_CHOICES
    if not several or not all(isinstance(each, str) and each for each in given):
        raise UsageError(
            f"structured_outputs.choice is {given!r:.80}; give a list of 1 to {MAX_CHOICES} texts, none of them empty"
        )
    return tuple(given)
