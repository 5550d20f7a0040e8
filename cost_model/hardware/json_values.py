"""Dataclasses as JSON values, and back: what a file of them needs."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from policies.common.errors import DataError, UsageError
from policies.common.json_files import check_keys

_Class = TypeVar("_Class")


def listed(value: Any) -> Any:
    """JSON's lists and text keys for tuples and whole-number keys."""
    if isinstance(value, dict):
        return {str(key): listed(each) for key, each in value.items()}
    return [listed(each) for each in value] if isinstance(value, tuple) else value


def build(kind: type[_Class], where: str, values: Mapping) -> _Class:
    """A dataclass from a JSON object with exactly its fields; those with a default may be absent.

    Raises:
        DataError: it is no object, or a key or value is unknown, missing or out of range; `where` names the object.
    """
    if not isinstance(values, dict):
        raise DataError(f"{where} must be a JSON object.")
    optional = {
        each.name for each in fields(kind) if each.default is not MISSING or each.default_factory is not MISSING
    }
    known = [each.name for each in fields(kind)]
    check_keys(where, values, known, [name for name in known if name not in optional])
    try:
        return kind(**values)
    except UsageError as error:
        raise DataError(f"in {where}, {error}") from error
