"""A prompt made of the columns of a row: `Translate to German: {text}`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Any

from flexmoe.errors import UsageError
from flexmoe.openai.json_line import InvalidLine, show
from policies.common.option_names import option
from policies.common.reading import without_bom


class PromptTemplate:
    """Text with columns in braces; a brace itself is written twice. A name is a column's, as a whole: dots and brackets
    in it mean nothing.

    Args:
        text: the option `prompt_template`.

    Raises:
        UsageError: it is no such text.
    """

    def __init__(self, text: str) -> None:
        self.text = without_bom(text)
        self._parts: list[tuple[str, str | None]] = []
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise UsageError(
                f"{option('prompt_template')}: {error}; write {{{{ and }}}} for braces themselves"
            ) from None
        for literal, name, spec, conversion in parts:
            if name is not None and (not name or name.isdigit() or spec or conversion):
                raise UsageError(
                    f"{option('prompt_template')}: {{{name}{'!' + conversion if conversion else ''}"
                    f"{':' + spec if spec else ''}}} is no column; write only names in braces, for example {{text}}"
                )
            self._parts.append((literal, name))
        self.columns = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.columns:
            raise UsageError(
                f"{option('prompt_template')} names no column, so that every prompt would be the same; write {{name}} for the "
                "column name"
            )

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            InvalidLine: a column is missing, or holds neither text nor a number.
        """
        return "".join(literal if name is None else literal + column_text(row, name) for literal, name in self._parts)


def column_text(row: Mapping[str, Any], name: str) -> str:
    """A column's value as text.

    Raises:
        InvalidLine: as `PromptTemplate.fill`.
    """
    value = column(row, name)
    if not isinstance(value, (str, int, float)):
        raise InvalidLine(f"the column {name} is {show(value)}; a template takes text and numbers", param=name)
    return str(value)


def column(row: Mapping[str, Any], name: str) -> Any:
    """A column's value.

    Raises:
        InvalidLine: the row has no such column, or nothing in it.
    """
    if name not in row:
        raise InvalidLine(f"there is no column {show(name)} but {named(row)}; name one of these", param=name)
    if row[name] is None:
        raise InvalidLine(f"the column {name} is null; a prompt needs its value", param=name)
    return row[name]


def named(columns: Iterable[str]) -> str:
    """Columns as a sentence names them."""
    return ", ".join(columns)[:200] or "none"
