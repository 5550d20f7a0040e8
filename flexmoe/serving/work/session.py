"""One model's turn: the rows of its batches and its online requests, merged into one stream through its engine, sweep by sweep."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from flexmoe.batch.engine_driver import EngineDriver
from flexmoe.errors import FlexMoEError, StorageError
from flexmoe.outputs import RequestOutput
from flexmoe.params import InFlight
from flexmoe.serving.work.batch_run import BatchRun, key_of
from flexmoe.serving.work.lifecycle import Lifecycle
from flexmoe.serving.work.models import Loaded
from flexmoe.serving.work.online_requests import OnlineRequest, RequestFailure
from flexmoe.serving.work.work_queue import View, WorkQueue

log = logging.getLogger(__name__)


class Session(EngineDriver):
    """What is in a model's engine.

    Args:
        loaded: the engine.
        work_queue: from which online requests are, and batches.
        lifecycle: ends those whose rows have ended.
        checkpoint_interval_s: seconds between two writes of what rows of batches have generated.
        clock: seconds.

    Attributes:
        results: how many requests have ended.
    """

    def __init__(
        self,
        loaded: Loaded,
        work_queue: WorkQueue,
        lifecycle: Lifecycle,
        checkpoint_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(loaded.llm.engine, checkpoint_interval_s, clock)
        self._loaded, self._work_queue, self._lifecycle = loaded, work_queue, lifecycle
        # Both by their keys.
        self._runs: dict[str, BatchRun] = {}
        self._online: dict[str, OnlineRequest] = {}
        self.results = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in the engine."""
        return not self._engine.unfinished

    def follow(self, view: View) -> None:
        """Does what the work queue asks for before the next sweep.

        Raises:
            FlexMoEError: a batch's file or journal cannot be used; that batch is no longer in the engine then.
        """
        for run in view.ended:
            self._abort(run.key)
            self._leave(run)
        for online in view.dropped:
            self._abort(online.key)
            self._end_online(online)
        for online in view.requests:
            self._begin_online(online)
        for run in view.batches:
            self._guarded(run, lambda run=run: self._begin(run))  # type: ignore[misc]
        self._fill([run for run in view.batches if run.key in self._runs])

    def sweep(self) -> None:
        """Runs one sweep, and gives what came of it to those who asked.

        Raises:
            Exception: the engine failed.
        """
        self._give(self._engine.step())
        self._tell_progress()
        for run in [run for run in self._runs.values() if not run.job.rows_left]:
            self._leave(run)
        if self.is_checkpoint_due:
            self.checkpoint()

    def _tell_progress(self) -> None:
        """Gives the online requests that stream what has been generated of them."""
        told: dict[str, list[InFlight]] = {online.key: [] for online in self._online.values() if online.streams}
        if not told:
            return
        for state in self._engine.in_flight(lambda request_id: key_of(request_id) in told):
            told[key_of(state.request_id)].append(state)
        for key, states in told.items():
            if states:
                self._online[key].progress(states)

    def keep_generated(self) -> None:
        """Writes what the rows of all batches have generated; a batch whose disk fails leaves, and nothing is raised."""
        in_flight = self._engine.in_flight()
        for run in list(self._runs.values()):
            self._guarded(run, lambda run=run: run.checkpoint(in_flight))  # type: ignore[misc]

    def end(self) -> None:
        """The turn is over, and nothing is in the engine."""
        self._runs.clear()
        for run in self._work_queue.release():
            self._lifecycle.finish(run)

    def lost(self) -> list[BatchRun]:
        """The engine failed: its batches, with what their rows had generated kept as far as that is possible."""
        self.try_checkpoint()
        runs = list(self._runs.values())
        for run in runs:
            self._work_queue.take(run)
        self._runs.clear()
        return runs

    def _begin(self, run: BatchRun) -> None:
        if run.key not in self._runs:
            self._runs[run.key] = run
            run.begin(self._loaded.llm, self._loaded.plan.policy.block_size)

    def _fill(self, runs: Iterable[BatchRun]) -> None:
        """Queues rows until a block waits: those of the first batch, then those of the next one."""
        for run in runs:
            self._guarded(run, lambda run=run: self._pull(run))  # type: ignore[misc]
            if not self.has_room:
                return

    def _pull(self, run: BatchRun) -> None:
        while self.has_room and (request := run.pull()) is not None:
            refused = self.queue(request)
            if refused is not None:
                run.take(refused)
        if not run.job.rows_left:
            self._leave(run)

    def _begin_online(self, online: OnlineRequest) -> None:
        self._online[online.key] = online
        for request in online.requests:
            refused = self.queue(request, urgent=True)
            if refused is not None:
                self._abort(online.key)
                failure = RequestFailure(status=400, code="cannot_run", message=refused.error or "it cannot run")
                online.fail(failure)
                self._end_online(online)
                return

    def _give(self, results: Iterable[RequestOutput]) -> None:
        for result in results:
            self.results += 1
            key = key_of(result.request_id)
            online, run = self._online.get(key), self._runs.get(key)
            if online is not None:
                online.take(result)
                if online.failure is not None:
                    self._abort(key)  # where one of its prompts has failed, the others are of no use
                if online.is_done:
                    self._end_online(online)
            elif run is not None:
                self._guarded(run, lambda run=run, result=result: run.take(result))  # type: ignore[misc]

    def _guarded(self, run: BatchRun, work: Callable[[], None]) -> None:
        """Works on a batch; where its disk or its file fails, it leaves, and the others go on."""
        try:
            work()
        except FlexMoEError as error:
            log.warning("batch %s: %s", run.id, error)
            self._abort(run.key)
            self._runs.pop(run.key, None)
            self._work_queue.take(run)
            if isinstance(error, StorageError):
                self._lifecycle.reopen_later(run)
            else:
                self._lifecycle.fail(run, error)

    def _leave(self, run: BatchRun) -> None:
        """All rows of a batch have ended, or none of them is in the engine any longer."""
        self._runs.pop(run.key, None)
        self._work_queue.take(run)
        self._lifecycle.finish(run)

    def _end_online(self, online: OnlineRequest) -> None:
        self._online.pop(online.key, None)
        self._work_queue.done(online)

    def _abort(self, key: str) -> None:
        self._engine.abort_all(lambda request_id: key_of(request_id) == key)
