"""How lines become requests: those of JSONL, lines of text, and rows of data with columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flexmoe.errors import UsageError
from flexmoe.inputs.prompt_template import PromptTemplate, column, named
from flexmoe.openai.batch_line import Request, parse_line, read_custom_id, read_object, request_of
from flexmoe.openai.json_line import InvalidLine
from policies.common.option_names import option

#: The column that a line of text is, for a template.
TEXT_COLUMN = "text"
ID_COLUMN = "custom_id"
Setup = dict[str, str | None]

_DEFAULT_COLUMNS = ("prompt", "messages")


class Parser(Protocol):
    """From the data of a line to a request."""

    @property
    def unit(self) -> str:
        """What a line is called."""

    def parse(self, data: bytes, number: int) -> Request:
        """The request of the line with this 1-based number.

        Raises:
            InvalidLine: it cannot be understood as a request.
        """

    def setup(self) -> Setup:
        """What `parser_of` makes the same parser of, in another process."""


def parser_of(setup: Setup) -> Parser:
    """The parser with this `setup`."""
    values = dict(setup)
    kind, text = values.pop("kind"), values.pop("template", None)
    if kind == "json":
        return JsonLines()
    template = None if text is None else PromptTemplate(text)
    if kind == "text":
        return TextLines(template=template)
    return DataRows(template=template, prompt_column=values["prompt_column"], unit=values["unit"] or "row")


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """The lines of a JSONL file: OpenAI Batch lines and plain rows."""

    unit: str = "line"

    def setup(self) -> Setup:
        return {"kind": "json"}

    def parse(self, data: bytes, number: int) -> Request:
        return parse_line(data, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLines:
    """Every line that is not blank is a prompt; spaces around it belong to it, line ends do not.

    Args:
        template: put the line into it.
    """

    template: PromptTemplate | None = None
    unit: str = "line"

    def setup(self) -> Setup:
        return {"kind": "text", "template": None if self.template is None else self.template.text}

    def parse(self, data: bytes, number: int) -> Request:
        if b"\0" in data:
            raise InvalidLine(f"byte {data.index(0) + 1} is NUL; save the file as UTF-8 text")
        try:
            text = data.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidLine(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        prompt = text if self.template is None else self.template.fill({TEXT_COLUMN: text})
        return request_of({"prompt": prompt}, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRows:
    """Rows with columns, as JSON objects: one column is the prompt (text, token ids or a chat's messages), or a template
    makes it. A column `custom_id` (text or a whole number) names the row; other columns mean nothing.

    Args:
        prompt_column: None where there is a template.
    """

    prompt_column: str | None
    template: PromptTemplate | None = None
    unit: str = "row"

    @classmethod
    def of(cls, prompt_column: str | None, template: PromptTemplate | None, columns: Iterable[str]) -> DataRows:
        """For a table with these columns.

        Raises:
            UsageError: it lacks a column that is asked for.
        """
        columns = list(columns)
        if template is None and prompt_column is None:
            prompt_column = next((name for name in _DEFAULT_COLUMNS if name in columns), None)
            if prompt_column is None:
                raise UsageError(
                    f"the input has neither a column prompt nor messages but {named(columns)}; name one with "
                    f"{option('prompt_column')}, or several with {option('prompt_template')}"
                )
        rows = cls(prompt_column=prompt_column, template=template)
        missing = [name for name in rows.columns if name not in columns]
        if missing:
            raise UsageError(f"the input has no column {missing[0]!r} but {named(columns)}; name one of these")
        return rows

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that make the prompt."""
        if self.template is not None:
            return self.template.columns
        return () if self.prompt_column is None else (self.prompt_column,)

    def setup(self) -> Setup:
        template = None if self.template is None else self.template.text
        return {"kind": "rows", "prompt_column": self.prompt_column, "template": template, "unit": self.unit}

    def parse(self, data: bytes, number: int) -> Request:
        def id_of(row: Mapping[str, Any]) -> str:
            custom_id = row.get(ID_COLUMN)
            is_number = isinstance(custom_id, int) and not isinstance(custom_id, bool)
            return read_custom_id({ID_COLUMN: str(custom_id) if is_number else custom_id}, number)

        row = read_object(data, id_of)
        # The id comes first: a row whose prompt is at fault has one all the same.
        custom_id = id_of(row)
        try:
            return request_of({ID_COLUMN: custom_id} | self._prompt(row), number)
        except InvalidLine as error:
            error.custom_id = custom_id
            raise

    def _prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.template is not None:
            return {"prompt": self.template.fill(row)}
        [name] = self.columns
        value = column(row, name)
        is_chat = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
        return {"messages" if is_chat else "prompt": value}
