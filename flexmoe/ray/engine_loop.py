"""One engine and the thread that drives it: rows come from any thread, whenever they come, and run in one stream."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from flexmoe.batch.engine_driver import EngineDriver
from flexmoe.batch.failures import as_user_errors
from flexmoe.errors import UsageError
from flexmoe.llm import LLM
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest, InFlight
from flexmoe.ray.token_journal import TokenJournal

log = logging.getLogger(__name__)
#: After so many sweeps it is said, once, where there have never been as many rows as the policy has places.
_SWEEPS_TO_JUDGE = 50


@dataclass(slots=True)
class _Row:
    """A row that has been asked for, until it is released.

    Args:
        key: in the journal.
        result: None as long as it runs.
    """

    key: bytes
    request: EngineRequest
    future: Future[RequestOutput]
    result: RequestOutput | None = None


class EngineLoop(EngineDriver):
    """Runs rows as they come. No more of them wait in the engine than one block; the others wait before it.

    Args:
        llm: whose engine it is; nobody else may use it meanwhile.
        journal: keeps the tokens of rows that have not been released; None keeps none.
        on_failure: called in the thread of the loop when the engine has failed, before its rows have that error: where it ends
            the process, nobody takes the failure for one of the rows.
    """

    def __init__(self, llm: LLM, journal: TokenJournal | None, on_failure: Callable[[Exception], None]) -> None:
        super().__init__(llm.engine, math.inf if journal is None else journal.interval_s)
        self._journal, self._on_failure = journal, on_failure
        self._inbox: deque[_Row] = deque()
        self._rows: dict[str, _Row] = {}
        self._changed = threading.Condition()
        self._ended: Exception | None = None
        self._closing = False
        self._sweeps = self._most_rows = 0
        self._thread = threading.Thread(target=self._run, name="flexmoe-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[tuple[bytes, EngineRequest]]) -> list[Future[RequestOutput]]:
        """Queues rows, with their keys in the journal; their ids differ from those of all others that are not released.

        Raises:
            UsageError: the loop is closed.
            Exception: the engine has failed.
        """
        asked = [_Row(key, request, Future()) for key, request in rows]
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._rows |= {row.request.request_id: row for row in asked}
            self._inbox.extend(asked)
            self._most_rows = max(self._most_rows, len(self._rows))
            self._changed.notify()
        return [row.future for row in asked]

    def release(self, request_ids: Iterable[str]) -> None:
        """Forgets rows whose results have been handed back: from now on the journal does without them."""
        with self._changed:
            for request_id in request_ids:
                self._rows.pop(request_id, None)

    def close(self) -> None:
        """Ends the loop after the sweep that is running; rows that have no result yet get an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with as_user_errors():
                while self._fill():
                    self._sweep()
            self._end(UsageError("this engine is closed; make a new one"))
        except Exception as error:  # noqa: BLE001 - whoever made the loop decides what is to become of it
            self.try_checkpoint()
            self._on_failure(error)
            self._end(error)

    def _fill(self) -> bool:
        """Waits for work, and queues it in the engine until a block waits there; returns whether the loop is to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._inbox or self._engine.unfinished)
            if self._closing:
                return False
            while self._inbox and self.has_room:
                row = self._inbox.popleft()
                refused = self.queue(row.request)
                if refused is not None:
                    self._finish(row, refused)
            return True

    def _sweep(self) -> None:
        for result in self._engine.step():
            with self._changed:
                row = self._rows.get(result.request_id)
            if row is not None:  # else who asked has given up
                self._finish(row, result)
        if self.is_checkpoint_due:
            self.try_checkpoint()
        self._sweeps += 1
        if self._sweeps == _SWEEPS_TO_JUDGE and self._most_rows < self._ahead:
            log.warning(
                "there have been at most %d rows at once, and the policy has places for %d; give the actor more of them "
                "(rows_in_flight of flexmoe.ray.generate)",
                self._most_rows,
                self._ahead,
            )

    @staticmethod
    def _finish(row: _Row, result: RequestOutput) -> None:
        row.result = result
        row.future.set_result(result)

    def _states(self) -> Iterator[tuple[bytes, InFlight]]:
        """What all rows that are not released have generated."""
        states = {state.request_id: state for state in self._engine.in_flight()}
        with self._changed:
            rows = list(self._rows.items())
        for request_id, row in rows:
            state = states.get(request_id) if row.result is None else _state(row.result)
            if state is not None:
                yield row.key, state

    def keep_generated(self) -> None:
        """Writes what rows have generated that are not released.

        Raises:
            StorageError: the disk is full, or failed.
        """
        if self._journal is not None:
            self._journal.save(self._states())

    def _end(self, error: Exception) -> None:
        with self._changed:
            self._ended = error
            rows = [row for row in self._rows.values() if row.result is None]
        for row in rows:
            row.future.set_exception(error)


def _state(result: RequestOutput) -> InFlight | None:
    """What a row that has its result has generated; None for one that failed."""
    if not result.outputs:
        return None
    [output] = result.outputs
    ids = list(output.token_ids)
    return InFlight(request_id=result.request_id, index=0, token_ids=ids, logprobs=None)
