"""What an input is, and how it is opened."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexmoe.errors import InputMissingError, UsageError
from flexmoe.inputs.parsers import DataRows, JsonLines, Parser, TextLines
from flexmoe.inputs.prompt_template import PromptTemplate
from flexmoe.inputs.request_file import OnInvalid, RequestFile
from flexmoe.inputs.tables import dataset_rows, parquet_rows
from policies.common.option_names import option

Format = Literal["auto", "jsonl", "text", "parquet", "dataset"]

FORMATS: tuple[Format, ...] = ("auto", "jsonl", "text", "parquet", "dataset")
_SUFFIXES: dict[str, Format] = {".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """How an input is to be read.

    Args:
        format: `auto` goes by the name: .txt is text, .parquet Parquet, a directory a dataset, all else JSONL.
        prompt_column: the column of a table that is the prompt; with JSONL, the rows are those of a table then.
        prompt_template: text that makes the prompt of the columns of a row, or of `{text}`, a line.
        dataset_split: of a dataset that has several.
        on_invalid: whether a structural fault fails the job, or becomes an error row.

    Raises:
        UsageError: a value that cannot be used, or two that exclude each other.
    """

    format: Format = "auto"
    prompt_column: str | None = None
    prompt_template: str | None = None
    dataset_split: str = "train"
    on_invalid: OnInvalid = "fail"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"{option('input_format')} is {self.format!r}; choose {', '.join(FORMATS)}")
        if self.on_invalid not in ("fail", "record"):
            raise UsageError(f"{option('on_invalid')} is {self.on_invalid!r}; choose fail or record")
        if self.prompt_column is not None and self.prompt_template is not None:
            both = f"{option('prompt_column')} and {option('prompt_template')}"
            raise UsageError(f"{both} exclude each other; give one")
        self.template()

    def template(self) -> PromptTemplate | None:
        """The template, ready to be filled."""
        return None if self.prompt_template is None else PromptTemplate(self.prompt_template)

    def identity(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What, beside the content of the input at `path`, decides what its rows say: for a job that is resumed."""
        return {
            "input_format": self.format_of(path),
            "prompt_column": self.prompt_column,
            "prompt_template": self.prompt_template,
            "on_invalid": self.on_invalid,
        }

    def format_of(self, path: str | os.PathLike[str]) -> Format:
        """The format of an input with this name."""
        if self.format != "auto":
            return self.format
        return "dataset" if Path(path).is_dir() else _SUFFIXES.get(Path(path).suffix.lower(), "jsonl")


def open_requests(
    path: str | os.PathLike[str], options: InputOptions | None = None, scratch: Path | None = None
) -> RequestFile:
    """Opens and validates an input of any format.

    Args:
        path: a file, a dataset's directory or its name.
        scratch: directory for the rows of tables, about as large as their text; None means the system's for such files.

    Raises:
        UsageError: an option does not suit the input, or a library is missing.
        InputMissingError: there is no such input.
        DataError: rows are structurally at fault, or there are none.
        StorageError: reading failed, or there is no room.
    """
    options = options or InputOptions()
    kind, template, column = options.format_of(path), options.template(), options.prompt_column
    if kind in ("parquet", "dataset"):
        where = scratch or Path(tempfile.gettempdir())
        if kind == "parquet":
            file, rows = parquet_rows(Path(path), column, template, where)
        else:
            file, rows = dataset_rows(os.fspath(path), options.dataset_split, column, template, where)
        return RequestFile(file, os.fspath(path), rows, options.on_invalid)
    if Path(path).is_dir():
        raise InputMissingError(f"{path} is no regular file; save the requests to a file first")
    return RequestFile.open(path, _parser(kind, column, template), options.on_invalid)


def _parser(kind: Format, column: str | None, template: PromptTemplate | None) -> Parser:
    if kind == "text":
        if column is not None:
            raise UsageError(f"lines of text have no columns; leave {option('prompt_column')} out")
        return TextLines(template=template)
    if column is None and template is None:
        return JsonLines()
    return DataRows(prompt_column=column, template=template, unit="line")
