"""Files of JSON that one program writes and another reads: read strictly, written whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from policies.common import strict_json
from policies.common.checks import check_count
from policies.common.errors import DataError, InputMissingError, StorageError


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The value in a strict JSON file; `what` names it in errors ("the policy file").

    Raises:
        InputMissingError: there is no such file, or it cannot be read.
        DataError: it is not UTF-8, not JSON, gives a key twice or holds a number that is none.
    """
    try:
        return strict_json.parse(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputMissingError(f"{what} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {path} is not UTF-8 text.") from error
    except strict_json.RepeatedKeyError as error:
        keys = ", ".join(map(repr, sorted(error.keys)))
        raise DataError(f"{what} {path} cannot be used: {keys} is given more than once.") from error
    except strict_json.NotFiniteError as error:
        raise DataError(f"{what} {path} cannot be used: {error.literal} is not a finite number.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {path} cannot be used: it is not valid JSON: {error}.") from error


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


def check_keys(where: str, values: Mapping, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raises DataError for keys that are not `known` and for `required` ones that are not there; all are named."""
    known = sorted(known)
    unknown = [repr(key) for key in values if key not in known]
    if unknown:
        raise DataError(f"{where} has unknown keys: {', '.join(unknown)}; the known ones are {', '.join(known)}.")
    missing = [key for key in required if key not in values]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}.")


def write_json(path: str | os.PathLike, document: Mapping, what: str) -> None:
    """Writes a JSON file under its final name in one step: either all of it is there, or what was there before.

    Raises:
        StorageError: the directory is missing, read-only or full; `what` is like "the policy".
        ValueError: the document holds a number that is not finite; nothing was written.
    """
    path = Path(path)
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise StorageError(f"{what} could not be written to {path}: {error.strerror}.") from error
