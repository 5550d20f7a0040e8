"""How long a row is expected to become: from the lengths of the job's own completions, `--reserve p95`.

Users ask for 1024 tokens and get 200. KV reserved for 1024 keeps rows out that would have fitted, so once enough rows have
ended, a row is expected to end where 95 % of those that came as far as it ended. The rows that have ended are the short
ones while the long ones still run; so the lengths are estimated as lifetimes are, with those that are still going (and
those that were cut at their own limit) counted as long as they were there: Kaplan and Meier, "Nonparametric estimation
from incomplete observations", J. Am. Stat. Assoc. 53 (1958).

An open row, one that names no limit, may take all the context, and hardly one does. Where nothing is known of it, it is
expected to take `flexmoe.params.EXPECTED_NEW_TOKENS`, and then twice what it has.

A row that becomes longer than expected may find its tier full; then the youngest row is preempted
(`policies.admission.admission`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from flexmoe.engine.scheduler import Row
from flexmoe.params import EXPECTED_NEW_TOKENS

#: Rows that must have ended before their lengths say anything, and how many of the latest are looked at.
FIRST_ROWS, LATEST_ROWS = 64, 4096
#: Of the rows that come as far as a row, this share ends later than it is expected to.
SHARE_LATER = 0.05
#: Fewer rows than this beyond some length say nothing about what lies beyond it.
TAIL_ROWS = 20
#: The estimate is made again after so many more ends.
_ENDS_PER_ESTIMATE = 32
_ROUNDING = 1e-9


class LengthEstimate:
    """Learns the lengths of completions.

    Args:
        running: the rows in flight.
        open_rows: whether requests without ``max_tokens`` have no limit of their own.
    """

    def __init__(self, running: Callable[[], Iterable[Row]], *, open_rows: bool = False):
        self._running, self._open_rows = running, open_rows
        self._ended: deque[tuple[int, bool]] = deque(maxlen=LATEST_ROWS)
        self._fresh = 0
        self._lengths: np.ndarray = np.empty(0)
        self._later: np.ndarray = np.empty(0)
        self._beyond: np.ndarray = np.empty(0)

    def add(self, row: Row) -> None:
        """Learn from a row that has ended."""
        if _may_end_early(row):
            self._ended.append((row.generated, row.length < row.limit))
            self._fresh += 1

    def expected_end(self, row: Row) -> int:
        """The length, prompt included, that the row is expected to reach; never above its limit."""
        if len(self._ended) < FIRST_ROWS or not _may_end_early(row):
            return self._unlearned(row)
        if self._fresh >= _ENDS_PER_ESTIMATE:
            self._estimate()
        # The first length that no more than the share of those outlives that have outlived what the row has by now.
        at = int(np.searchsorted(self._lengths, row.generated, side="right"))
        if at == len(self._lengths) or self._beyond[at] < TAIL_ROWS:
            return self._unlearned(row)
        outlived = self._later[at - 1] if at else 1.0
        end = int(np.searchsorted(-self._later, -SHARE_LATER * outlived * (1 + _ROUNDING)))
        if end == len(self._lengths):
            return self._unlearned(row)
        return min(row.limit, row.prompt + int(self._lengths[end]))

    def _unlearned(self, row: Row) -> int:
        """The length that a row is expected to reach where the rows that have ended do not say."""
        if not self._open_rows or row.request.params.max_tokens is not None or not _may_end_early(row):
            return row.limit
        expected = EXPECTED_NEW_TOKENS
        while expected <= row.generated:
            expected *= 2
        return min(row.limit, row.prompt + expected)

    def _estimate(self) -> None:
        """``_later``: the share of all completions that is longer than each of ``_lengths``; ``_beyond``: how many rows
        were seen to come as far."""
        self._fresh = 0
        seen = [*self._ended, *((r.generated, False) for r in self._running() if r.generated and _may_end_early(r))]
        lengths, ended = np.array([n for n, _ in seen]), np.array([end for _, end in seen])
        self._lengths, ends = np.unique(lengths[ended], return_counts=True)
        self._beyond = len(lengths) - np.searchsorted(np.sort(lengths), self._lengths)
        self._later = np.cumprod(1 - ends / np.maximum(self._beyond, 1))


def _may_end_early(row: Row) -> bool:
    params = row.request.params
    return row.limit > row.prompt and (not params.ignore_eos or bool(params.stop or params.stop_token_ids))
