"""Parquet files and Hugging Face datasets: their rows are written once, as JSON lines, into an unnamed file.

Rows are wanted in another order than the table has them, hours later, and a row group may be as large as memory; a file of
lines is read anywhere. It holds only the columns that are asked for, and goes when the job does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from flexmoe.errors import DataError, InputMissingError, UsageError
from flexmoe.inputs.parsers import ID_COLUMN, DataRows
from flexmoe.inputs.prompt_template import PromptTemplate
from policies.common.file_io import storage_errors
from policies.common.option_names import option

_BATCH_ROWS = 64  # few, because a row may be long
#: Read so many bytes at a time: by default pyarrow reads a whole column of a row group, which may be all of the file.
_STREAMED = {"buffer_size": 1 << 20, "pre_buffer": False}


def parquet_rows(
    path: Path, prompt_column: str | None, template: PromptTemplate | None, scratch: Path
) -> tuple[IO[bytes], DataRows]:
    """The rows of a Parquet file, as lines, and what parses them.

    Raises:
        UsageError: pyarrow is not installed, or a column is not there.
        InputMissingError: there is no such file.
        DataError: it is no Parquet file, or is damaged.
        StorageError: there is no room for the lines in `scratch`.
    """
    parquet = _needed("pyarrow.parquet")
    if not path.is_file():
        raise InputMissingError(f"the input file {path} does not exist; check its name")
    try:
        with parquet.ParquetFile(path, **_STREAMED) as file:
            rows = DataRows.of(prompt_column, template, file.schema_arrow.names)
            wanted = _wanted(rows, file.schema_arrow.names)
            return _written(file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted), scratch), rows
    except (ValueError, OSError) as error:  # pyarrow's errors are among them
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None


def dataset_rows(
    name: str, split: str, prompt_column: str | None, template: PromptTemplate | None, scratch: Path
) -> tuple[IO[bytes], DataRows]:
    """The rows of a dataset: a directory that `save_to_disk` made, or the name of one that can be downloaded, with its
    configuration after a colon (`openai/gsm8k:main`).

    Raises:
        UsageError: datasets is not installed, or there is no such split or column.
        InputMissingError: there is no such dataset.
        StorageError: there is no room for the lines in `scratch`.
    """
    table = _dataset(name, split).with_format("arrow")
    rows = DataRows.of(prompt_column, template, table.column_names)
    table = table.select_columns(_wanted(rows, table.column_names))
    batches = (table[start : start + _BATCH_ROWS] for start in range(0, len(table), _BATCH_ROWS))
    return _written(batches, scratch), rows


def _dataset(name: str, split: str) -> Any:
    datasets = _needed("datasets")
    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
        else:
            repository, _, configuration = name.partition(":")
            found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the library and the hub raise a dozen unrelated types
        raise InputMissingError(f"{name} cannot be read as a dataset: {_first_line(error)}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UsageError(
            f"{name} has no split {split!r} but {', '.join(found)}; choose one with {option('dataset_split')}"
        )
    return found[split]


def _wanted(rows: DataRows, columns: list[str]) -> list[str]:
    """The columns to read, each once: those of the prompt, and the id's where there is one."""
    return list(dict.fromkeys((*rows.columns, *(name for name in columns if name == ID_COLUMN))))


def _written(batches: Iterator[Any], scratch: Path) -> IO[bytes]:
    """Record batches (or tables) as JSON lines in a file without a name."""
    with storage_errors(scratch):
        file = tempfile.TemporaryFile(dir=scratch, prefix=".flexmoe-")
    try:
        for batch in batches:
            columns = [_values(batch.column(name)) for name in batch.schema.names]
            with storage_errors(scratch):
                file.write(b"".join(_line(batch.schema.names, values) for values in zip(*columns, strict=True)))
        with storage_errors(scratch):
            file.flush()
        return file
    except BaseException:
        file.close()
        raise


def _line(names: list[str], values: tuple[Any, ...]) -> bytes:
    text = json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False, default=_plain)
    # Bytes that are not UTF-8 stay as they are, for the parser to find.
    return text.encode("utf-8", "surrogateescape") + b"\n"


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet promises UTF-8 and nobody checks
        return [_value(item) for item in column]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return (
            item.as_buffer().to_pybytes().decode("utf-8", "surrogateescape") if hasattr(item, "as_buffer") else "\udcff"
        )


def _plain(value: Any) -> str:
    """Dates, decimals and bytes as text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _needed(module: str) -> ModuleType:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(
            f"this input needs {package}, which is not installed; pip install 'flexmoe[data]' brings it"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
