"""Makes the masks of a sweep's rows while the sweep is computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmoe.structured.grammars import llguidance
from flexmoe.structured.row import RowGrammar


@dataclass(frozen=True, slots=True)
class Masks:
    """Those of a sweep, which may still be under way."""

    future: Future[None] | None

    def wait(self) -> None:
        """Until each row has its mask or its problem."""
        if self.future is not None:
            self.future.result()


class MaskMaker:
    """A thread that makes masks, with more below it in the library, which holds no lock of Python's meanwhile.

    Args:
        threads: of the library; None: a quarter of the cores, since the others compute.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = max(1, (os.cpu_count() or 1) // 4) if threads is None else threads
        self._pool: ThreadPoolExecutor | None = None
        self._executor: Any = None

    @contextlib.contextmanager
    def making(self, rows: Sequence[RowGrammar]) -> Iterator[Masks]:
        """Make the masks of these rows; nothing is under way any longer when the context is left."""
        future = None if not rows else self._started().submit(self._make, list(rows))
        try:
            yield Masks(future)
        finally:
            if future is not None:
                wait([future])

    def _started(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._executor = llguidance().LLExecutor(self._threads)
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="masks")
        return self._pool

    def close(self) -> None:
        """Stop the thread; a second call does nothing."""
        if self._pool is not None:
            self._pool.shutdown()

    def _make(self, rows: list[RowGrammar]) -> None:
        open_rows = [(row, matcher) for row in rows if (matcher := row.matcher) is not None]
        if not open_rows:
            return
        words = -(-max(row.vocab_size for row, _ in open_rows) // 32)
        masks = np.zeros((len(open_rows), words), np.uint32)
        numbered = [(matcher, at) for at, (_, matcher) in enumerate(open_rows)]
        self._executor.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, words * 4, len(open_rows))
        for (row, _), mask in zip(open_rows, masks.view(np.uint8)):
            row.take(mask)
