"""The columns of a batch, in each of the forms that Ray Data gives one in: numpy arrays, a pandas frame or an Arrow table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexmoe.errors import UsageError


def column(batch: Any, name: str) -> list[Any] | None:
    """The values of a column as Python has them: no arrays, no numpy numbers; None where there is no such column.

    Raises:
        UsageError: this is no batch of Ray Data's.
    """
    if not (isinstance(batch, Mapping) or hasattr(batch, "columns")):
        raise UsageError(f'a batch is of type {type(batch).__name__}; take batch_format "numpy", "pandas" or "pyarrow"')
    names = batch.column_names if _is_table(batch) else list(batch)
    if name not in names:
        return None
    values = batch[name].to_pylist() if _is_table(batch) else list(batch[name])
    return [_plain(value) for value in values]


def rows_of(batch: Any) -> int:
    """How many rows a batch has."""
    if _is_table(batch):
        return int(batch.num_rows)
    return len(next(iter(batch.values()), ())) if isinstance(batch, Mapping) else len(batch)


def with_columns(batch: Any, added: Mapping[str, tuple[type, Sequence[Any]]]) -> Any:
    """The same batch, in its own form, with more columns, each with the type of its values; of two of one name the new one
    stays."""
    if _is_table(batch):
        return _table_with(batch, added)
    arrays = {name: _array(kind, values) for name, (kind, values) in added.items()}
    return {**batch, **arrays} if isinstance(batch, Mapping) else batch.assign(**arrays)


def _is_table(batch: Any) -> bool:
    return hasattr(batch, "column_names")


def _table_with(table: Any, added: Mapping[str, tuple[type, Sequence[Any]]]) -> Any:
    import pyarrow

    types = {str: pyarrow.string(), int: pyarrow.int64(), list: pyarrow.list_(pyarrow.int64())}
    for name, (kind, values) in added.items():
        array = pyarrow.array(values, types[kind])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, array)
        else:
            table = table.append_column(name, array)
    return table


def _array(kind: type, values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """One element for each row, also where the values are lists of one length."""
    array = np.empty(len(values), dtype=np.int64 if kind is int else object)
    for place, value in enumerate(values):
        array[place] = value
    return array


def _plain(value: Any) -> Any:
    """A value without numpy's arrays and numbers; what is missing in a column of numbers is None."""
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
