"""The thread that runs the engine: one model at a time is loaded, and has its turn as long as the order lets it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from flexmoe.batch.failures import as_user_errors
from flexmoe.errors import FlexMoEError
from flexmoe.serving.settings import ServerOptions
from flexmoe.serving.work.lifecycle import Lifecycle
from flexmoe.serving.work.models import Loaded, ServedModels, load
from flexmoe.serving.work.online_requests import RequestFailure
from flexmoe.serving.work.session import Session
from flexmoe.serving.work.stats import EngineStats
from flexmoe.serving.work.work_queue import WorkQueue

log = logging.getLogger(__name__)
#: The engine of a model may fail so many times in a row; then the rows that are left of its batches become error rows.
_MOST_FAILURES = 3
_STOPPED = RequestFailure(status=503, code="stopping", message="the server is stopping; ask again when it has started")


class EngineThread(threading.Thread):
    """Runs until the work_queue is stopped.

    Args:
        options: of the server.
        models: that it serves.
        work_queue: what waits.
        lifecycle: ends batches.
        stats: told what is done.
        loader: plans and loads an engine.

    Attributes:
        state: ``idle``, ``loading`` or ``running``, for people.
        loaded: the id of the model that is loaded, or being loaded; None before the first one.
    """

    def __init__(
        self,
        options: ServerOptions,
        models: ServedModels,
        work_queue: WorkQueue,
        lifecycle: Lifecycle,
        stats: EngineStats,
        loader: Callable[..., Loaded] = load,
    ) -> None:
        super().__init__(name="flexmoe-engine", daemon=True)
        self._options, self._models, self._work_queue, self._lifecycle = options, models, work_queue, lifecycle
        self._stats, self._loader = stats, loader
        self._loaded: Loaded | None = None
        self._loaded_s = 0.0
        self._failures: Counter[str] = Counter()
        self.state = "idle"
        self.loaded: str | None = None

    def run(self) -> None:
        """Turn after turn."""
        while (model := self._work_queue.next_model(self.loaded)) is not None:
            try:
                with as_user_errors():
                    self._load(model)
            except Exception as error:  # noqa: BLE001 - whatever it is, others may still be served
                self._not_loaded(model, error)
                continue
            self._turn()
        self._work_queue.fail_requests(_STOPPED, waiting=True)
        self._unload()

    def _load(self, model: str) -> None:
        runs = self._work_queue.waiting_for(model)
        held = self._loaded
        if held is not None and held.served.id == model:
            room = held.llm.largest_row_tokens
            if all(run.id in held.planned_for or run.needed_tokens <= room for run in runs):
                return
        self._unload()
        self.state, self.loaded = "loading", model
        served = self._models.get(model)
        if served is None:
            raise FlexMoEError(f"there is no model {model}")
        started_s = time.monotonic()
        self._loaded = self._loader(served, [(run.id, run.measured) for run in runs])
        self._loaded_s = time.monotonic()
        self._stats.loaded(self._loaded, self._loaded_s - started_s)
        log.info("%s is loaded, in %.1f s", model, self._loaded_s - started_s)
        threading.Thread(target=self._advise, args=(self._loaded,), name="flexmoe-advice", daemon=True).start()

    def _advise(self, loaded: Loaded) -> None:
        """Has the planner say what would help most, while the engine runs already."""
        try:
            advice = loaded.advice()
        except FlexMoEError as error:
            log.warning("what would help most is not known: %s", error)
            advice = ()
        self._stats.advised(loaded.served.id, advice)

    def _unload(self) -> None:
        if self._loaded is not None:
            self._loaded.llm.close()
            self._loaded = None
        self.state, self.loaded = "idle", None
        self._stats.unloaded()

    def _turn(self) -> None:
        loaded = self._loaded
        if loaded is None:
            return
        session = Session(loaded, self._work_queue, self._lifecycle, self._options.checkpoint_interval_s)
        try:
            with as_user_errors():
                self._sweeps(loaded, session)
        except Exception as error:  # noqa: BLE001 - batches resume in a new engine
            self._crashed(loaded, session, error)

    def _sweeps(self, loaded: Loaded, session: Session) -> None:
        """Sweep after sweep, until the turn is over."""
        room = loaded.llm.largest_row_tokens
        while True:
            self.state = "idle" if session.is_empty else "running"
            view = self._work_queue.view(
                loaded.served.id,
                may_leave=time.monotonic() - self._loaded_s >= self._options.least_turn_s,
                fits=loaded.planned_for,
                room_tokens=room,
                idle=session.is_empty,
            )
            if self._work_queue.is_stopping:
                session.checkpoint()
                return
            session.follow(view)
            if session.is_empty:
                if view.leave:
                    break
                continue
            self.state = "running"
            session.sweep()
            self._stats.swept(loaded, self._work_queue.runs())
            if session.results:
                self._failures.clear()
        session.end()

    def _crashed(self, loaded: Loaded, session: Session, error: Exception) -> None:
        """The engine failed: it is made anew, and batches resume from their journals, unless they fail again and again."""
        model = loaded.served.id
        log.error("the engine of %s failed: %s", model, error, exc_info=error)
        self._stats.failed(str(error))
        self._work_queue.fail_requests(
            RequestFailure(status=500, code="engine_error", message=f"the engine failed: {error}")
        )
        runs = session.lost()
        for run in self._work_queue.release():
            self._lifecycle.finish(run)
        self._unload()
        self._failures[model] += 1
        for run in runs:
            if self._failures[model] >= _MOST_FAILURES:
                run.ending = run.ending or "engine_error"
                self._lifecycle.finish(run)
            else:
                self._lifecycle.reopen(run)

    def _not_loaded(self, model: str, error: Exception) -> None:
        """A model cannot be loaded: nothing that waits for it can be served."""
        log.error("%s cannot be loaded: %s", model, error, exc_info=not isinstance(error, FlexMoEError))
        self._stats.failed(str(error))
        self._unload()
        self._work_queue.forget_switch(model)
        failure = RequestFailure(status=503, code="model_not_loaded", message=f"{model} cannot be loaded: {error}")
        self._work_queue.fail_requests_of(model, failure)
        self._failures[model] += 1
        for run in self._work_queue.waiting_for(model):
            if self._failures[model] >= _MOST_FAILURES:
                self._work_queue.take(run)
                run.ending = run.ending or "engine_error"
                self._lifecycle.finish(run)
        self._work_queue.pause()
