"""JSON without what Python adds to it, in one place for every file that comes from elsewhere.

Readers disagree on a key given twice, on NaN and on a number beyond float, so none of these may decide what is done.
The faults carry what was found: each caller says in its own sentence which file it was and what to change.
"""

import json
import math
from collections import Counter
from typing import Any


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
    """The value of a JSON text; bytes must be UTF-8.

    Raises:
        RepeatedKeyError, NotFiniteError: as above; both are `ValueError`.
        ValueError: it is not JSON or not UTF-8, or an integer has more digits than Python reads.
        RecursionError: it is nested deeper than Python can follow.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    return json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)


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
