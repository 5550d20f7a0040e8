"""What drives an engine for many askers: rows are queued as far as a block has room, and what they have generated is kept now and then."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from flexmoe.engine.engine import Engine
from flexmoe.engine.requests import RefusedError
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest

log = logging.getLogger(__name__)


class EngineDriver(ABC):
    """Whoever is asked holds the rows; no more of them wait in the engine than one block. One thread calls the methods.

    Args:
        engine: nobody else may use it meanwhile.
        checkpoint_interval_s: seconds between two checkpoints; infinite for none.
        clock: seconds.
    """

    def __init__(
        self, engine: Engine, checkpoint_interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._interval_s, self._clock = engine, checkpoint_interval_s, clock
        self._ahead = max(1, engine.config.policy.block_size)
        self._checkpoint_s = clock()

    @property
    def has_room(self) -> bool:
        """Whether more rows are to be queued: fewer than a block wait."""
        return self._engine.waiting < self._ahead

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self._clock() - self._checkpoint_s >= self._interval_s

    def queue(self, request: EngineRequest, *, urgent: bool = False) -> RequestOutput | None:
        """Queues a request in the engine; returns the result of one that can never run."""
        try:
            self._engine.submit(request, urgent=urgent)
        except RefusedError as refused:
            return request.failed(refused.reason)
        return None

    def checkpoint(self) -> None:
        """Keeps what rows have generated.

        Raises:
            StorageError: the disk is full, or failed.
        """
        self._checkpoint_s = self._clock()
        self.keep_generated()

    def try_checkpoint(self) -> None:
        """As `checkpoint`, where a failure is not the one to report: it only spares tokens, and rows run all the same."""
        try:
            self.checkpoint()
        except Exception as error:  # noqa: BLE001 - whatever it is, something else matters more
            log.warning("what the rows in flight have generated could not be kept: %s", error)

    @abstractmethod
    def keep_generated(self) -> None:
        """Writes it."""
