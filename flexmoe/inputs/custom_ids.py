"""Whether every row has an id of its own, with eight bytes a row instead of the ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable

import numpy as np


class CustomIds:
    """Hashes of the ids of a file's rows, in the order of the rows."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._sorted = np.empty(0, dtype=np.uint64)

    def add(self, custom_id: str | None) -> None:
        """The next row; None for one whose id could not be read."""
        self._hashes.append(0 if custom_id is None else _hash(custom_id))

    def repeated(self, read: Callable[[int], str | None]) -> dict[int, int]:
        """The rows that use an id again, with the first row that uses it.

        Args:
            read: the id of a row, read again where hashes are equal: ids are what is compared in the end.
        """
        if not self._hashes:
            return {}
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[order]
        same = self._sorted[1:] == self._sorted[:-1]
        suspects = np.zeros(len(order), dtype=bool)
        suspects[1:] |= same
        suspects[:-1] |= same
        first: dict[str, int] = {}
        repeated = {}
        for row in np.sort(order[suspects & (self._sorted != 0)]).tolist():
            custom_id = read(row)
            if custom_id is not None and first.setdefault(custom_id, row) != row:
                repeated[row] = first[custom_id]
        return repeated

    def free_name(self, line_number: int) -> str:
        """An id for a row that has none of its own, or one that is taken; after `repeated`. The number keeps it unique."""
        name, count = f"row-{line_number}", 1
        while self._is_taken(name):
            count += 1
            name = f"row-{line_number}-{count}"
        return name

    def _is_taken(self, name: str) -> bool:
        wanted = np.uint64(_hash(name))
        place = int(np.searchsorted(self._sorted, wanted))
        return place < len(self._sorted) and bool(self._sorted[place] == wanted)


def _hash(custom_id: str) -> int:
    """Eight bytes, never all zero: zero stands for no id."""
    return int.from_bytes(hashlib.blake2b(custom_id.encode("utf-8"), digest_size=8).digest(), "little") or 1
