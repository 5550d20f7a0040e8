"""How many KV blocks a tier will need, sweep by sweep, if every row in it grows to its expected end.

Pure arithmetic. Every row's future is known: it holds its prompt while it is prefilled, then grows by one token a
sweep until it ends. A new row may enter when the sum of all futures stays within the tier at every sweep to come.
"""

from __future__ import annotations

import numpy as np


def growth(tokens_after_prefill: int, prefill_sweeps: int, decode_sweeps: int, block_tokens: int) -> np.ndarray:
    """Blocks that a row holds in each coming sweep.

    Args:
        tokens_after_prefill: tokens in the cache once its run so far is complete; all are reserved at once.
        prefill_sweeps: sweeps until then, at least 1.
        decode_sweeps: sweeps of one token each after that.
        block_tokens: tokens per block.

    Returns:
        np.ndarray: int64 ``[prefill_sweeps + decode_sweeps]``.
    """
    tokens = np.full(prefill_sweeps + decode_sweeps, tokens_after_prefill, dtype=np.int64)
    tokens[prefill_sweeps:] += np.arange(1, decode_sweeps + 1)
    return -(-tokens // block_tokens)


class Projection:
    """The summed future of a tier's rows.

    Args:
        blocks: blocks of the tier.
    """

    def __init__(self, blocks: int):
        self.blocks = blocks
        self._now = 0
        self._usage = np.zeros(1, dtype=np.int64)
        self._rows: dict[object, tuple[int, np.ndarray]] = {}

    @property
    def peak(self) -> int:
        """The most blocks in use in any sweep to come."""
        return int(self._usage.max())

    def fits(self, curve: np.ndarray) -> bool:
        """Whether a row with this future can be added."""
        return int((self._padded(len(curve))[: len(curve)] + curve).max()) <= self.blocks and self.peak <= self.blocks

    def add(self, row: object, curve: np.ndarray) -> None:
        """Add a row's future."""
        self._usage = self._padded(len(curve))
        self._usage[: len(curve)] += curve
        self._rows[row] = (self._now, curve)

    def remove(self, row: object) -> None:
        """Take back what is left of a row's future."""
        start, curve = self._rows.pop(row)
        left = curve[self._now - start :]
        self._usage[: len(left)] -= left

    def advance(self) -> None:
        """One sweep has passed."""
        self._now += 1
        self._usage = self._usage[1:] if len(self._usage) > 1 else np.zeros(1, dtype=np.int64)

    def _padded(self, length: int) -> np.ndarray:
        missing = length - len(self._usage)
        return np.pad(self._usage, (0, missing)) if missing > 0 else self._usage.copy()
