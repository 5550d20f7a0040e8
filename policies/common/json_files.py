"""Files of JSON that one program writes and another reads: read strictly, written whole or not at all.

Readers disagree on a key given twice, on NaN and on a number beyond float, so none of these may decide what is done.
The faults that `parse` finds carry what was found: each caller says in its own sentence which file it was.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from policies.common import file_io
from policies.common.checks import check_count
from policies.common.errors import DataError, InputMissingError, StorageError, UsageError
from policies.common.fields import required, rules
from policies.common.reading import without_bom

_Class = TypeVar("_Class")


class RepeatedKeyError(ValueError):
    """An object gives a key more than once.

    Args:
        keys: each such key of that object, in the order of the file.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(f"the key {keys[0]!r} appears twice")
        self.keys = keys


class NotFiniteError(ValueError):
    """A number that is none, or that float cannot hold.

    Args:
        literal: as the file has it, for example `NaN` or `1e999`.
    """

    def __init__(self, literal: str) -> None:
        super().__init__(f"the number {literal} is not finite")
        self.literal = literal


def parse(data: str | bytes) -> Any:
    """The value of a JSON text, which may begin with a byte order mark; bytes must be UTF-8.

    Raises:
        RepeatedKeyError, NotFiniteError: as above; both are `ValueError`.
        ValueError: it is not JSON or not UTF-8, or an integer has more digits than Python reads.
        RecursionError: it is nested deeper than Python can follow.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    return json.loads(without_bom(text), object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RepeatedKeyError(tuple(key for key, count in counts.items() if count > 1))
    return table


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise NotFiniteError(literal)
    return value


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The value in a strict JSON file; `what` names it in errors ("the policy file").

    Raises:
        InputMissingError: there is no such file, or it cannot be read.
        DataError: it is not UTF-8, not JSON, gives a key twice or holds a number that is none.
    """
    try:
        return parse(Path(path).read_bytes())
    except OSError as error:
        raise InputMissingError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {path} is not UTF-8 text.") from error
    except RepeatedKeyError as error:
        keys = ", ".join(map(repr, sorted(error.keys)))
        raise DataError(f"{what} {path} cannot be used: {keys} is given more than once.") from error
    except NotFiniteError as error:
        raise DataError(f"{what} {path} cannot be used: {error.literal} is not a finite number.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} cannot be used: it is not valid JSON: {error}.") from error


def write_json(path: str | os.PathLike[str], document: Mapping[str, Any], what: str) -> None:
    """Writes a JSON file under its final name in one step: either all of it is there, or what was there before.

    Raises:
        StorageError: the directory is missing, read-only or full; `what` is like "the policy".
        ValueError: the document holds a number that is not finite; nothing was written.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    try:
        file_io.write_file(path, [text.encode()])
    except OSError as error:
        raise StorageError(f"{what} could not be written to {path}: {error.strerror}.") from error


def check_header(document: Any, kind: str, schema_version: int, what: str) -> None:
    """Refuses a document of another kind, or one that is newer than this program; `what` is like "a policy file".

    Raises:
        DataError: it is no object of that `kind`, or its schema_version is above `schema_version`.
        UsageError: its schema_version is not a whole number of at least 1.
    """
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise DataError(f'it is not {what}: it must be a JSON object with "kind": "{kind}".')
    version = check_count("schema_version", document.get("schema_version"))
    if version > schema_version:
        raise DataError(
            f"it has schema_version {version}, and this program reads up to {schema_version}; "
            "it was written by a newer FlexMoE, so update this one or make the file again."
        )


def check_keys(where: str, values: Mapping[str, Any], known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raises DataError for keys that are not `known` and for `required` ones that are not there; all are named."""
    known = sorted(known)
    unknown = [repr(key) for key in values if key not in known]
    if unknown:
        raise DataError(f"{where} has unknown keys: {', '.join(unknown)}; the known ones are {', '.join(known)}.")
    missing = [key for key in required if key not in values]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}.")


def listed(value: Any) -> Any:
    """JSON's lists and text keys for tuples and whole-number keys."""
    if isinstance(value, dict):
        return {str(key): listed(each) for key, each in value.items()}
    return [listed(each) for each in value] if isinstance(value, tuple) else value


def build(kind: type[_Class], where: str, values: Any) -> _Class:
    """A dataclass whose fields have rules, from a JSON object with exactly these; those with a default may be absent.

    Raises:
        DataError: it is no object, or a key or value is unknown, missing or out of range; `where` names the object.
    """
    if not isinstance(values, dict):
        raise DataError(f"{where} must be a JSON object.")
    check_keys(where, values, rules(kind), required(kind))
    known = [(name, rule) for name, rule in rules(kind).items() if name in values]
    read = {name: rule.read(f"{name} of {where}", values[name]) for name, rule in known}
    try:
        return kind(**read)
    except UsageError as error:
        raise DataError(f"in {where}, {error}") from error
