"""What a checkpoint has for texts: its tokenizer's files and its chat template, looked at without building a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.files import open_file, read_bytes, read_json_object
from flexmoe.errors import DataError, Faults
from flexmoe.openai.reasoning import Style, style_of
from flexmoe.text.backend import VOCABULARY_FILES, check_files
from flexmoe.text.chat_template import ChatTemplate

_CONFIG_FILE, _TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
_TEMPLATE_KEY = "chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """The files for texts.

    Args:
        tokenizer: the file of the vocabulary; None where there is none.
        tokenizer_class: as the tokenizer's config names it.
        template: the file of the chat template; None where there is none.
        reasoning: how the model writes what it thinks, as far as the template shows it.
        problems: why texts or chats cannot be used, as sentences.
    """

    tokenizer: str | None
    tokenizer_class: str | None
    template: str | None
    reasoning: Style | None
    problems: tuple[str, ...]


def text_files(directory: Path) -> TextFiles:
    """The files for texts of a checkpoint directory."""
    faults = Faults(keep=True)
    tokenizer = next((name for name in VOCABULARY_FILES if (directory / name).is_file()), None)
    config: Mapping[str, Any] = {}
    with faults.step():
        if tokenizer is None:
            raise DataError(f"there is no tokenizer (none of {', '.join(VOCABULARY_FILES)})")
        check_files(directory)
        config = read_json_object(directory / _CONFIG_FILE) if (directory / _CONFIG_FILE).is_file() else {}
    file, source = None, None
    with faults.step():
        file, source = _template(directory, config)
        if source is not None:
            ChatTemplate(source, {})
    kind = config.get("tokenizer_class")
    return TextFiles(
        tokenizer=tokenizer,
        tokenizer_class=kind if isinstance(kind, str) else None,
        template=file,
        reasoning=None if source is None else style_of(source, lambda mark: False),
        problems=tuple(map(str, faults.found)),
    )


def _template(directory: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The file and the text of the chat template; of several that have names, the one for chats."""
    path = directory / _TEMPLATE_FILE
    if path.is_file():
        with open_file(path) as (descriptor, size):
            return _TEMPLATE_FILE, read_bytes(descriptor, size).decode("utf-8", "replace")
    found = config.get(_TEMPLATE_KEY)
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return (_CONFIG_FILE, found) if isinstance(found, str) else (None, None)
