"""What waits for the engine, shared by the threads that bring it and the one that runs it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

from flexmoe.serving.work.batch_run import BatchRun
from flexmoe.serving.work.online_requests import OnlineRequest, RequestFailure
from flexmoe.serving.work.turns import Item, Turn, turn_of


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the engine's thread is to do before its next sweep.

    Args:
        leave: take no more rows; when those in the engine have ended, the turn is over.
        requests: online ones that begin now.
        dropped: online requests that nobody waits for any longer, wherever they are.
        batches: whose rows may enter, the first ones first.
        ended: that are to end before their rows have run.
    """

    leave: bool
    requests: tuple[OnlineRequest, ...]
    dropped: tuple[OnlineRequest, ...]
    batches: tuple[BatchRun, ...]
    ended: tuple[BatchRun, ...]


class WorkQueue:
    """Batches that have been looked at, requests and switches, until the engine takes them. Any thread may use it.

    Args:
        most_requests: that wait or run at one time.
    """

    def __init__(self, most_requests: int) -> None:
        self._changed = threading.Condition()
        self._runs: dict[str, BatchRun] = {}
        self._waiting: list[OnlineRequest] = []
        self._running: list[OnlineRequest] = []
        self._switch: Item | None = None
        self._most_requests, self._arrivals = most_requests, itertools.count()
        self._stopping = False

    # What clients bring.

    def next_arrival(self) -> int:
        """A place in the order of arrival."""
        return next(self._arrivals)

    def submit(self, request: OnlineRequest) -> bool:
        """An online request waits from now on; False where there are too many, or the server stops."""
        with self._changed:
            if self._stopping or len(self._waiting) + len(self._running) >= self._most_requests:
                return False
            self._waiting.append(request)
            self._changed.notify_all()
        return True

    def drop(self, request: OnlineRequest) -> None:
        """Nobody waits for an online request any longer."""
        with self._changed:
            request.is_dropped = True
            if request in self._waiting:
                self._waiting.remove(request)
            self._changed.notify_all()

    def switch(self, model: str) -> None:
        """The model is to be loaded when the order lets it."""
        with self._changed:
            self._switch = Item(model=model, arrival=self.next_arrival())
            self._changed.notify_all()

    def add(self, run: BatchRun) -> None:
        """A batch waits from now on."""
        with self._changed:
            self._runs[run.id] = run
            self._changed.notify_all()

    def run(self, batch_id: str) -> BatchRun | None:
        """A batch that waits or runs."""
        with self._changed:
            return self._runs.get(batch_id)

    def runs(self) -> list[BatchRun]:
        """All batches that wait or run."""
        with self._changed:
            return list(self._runs.values())

    def end(self, batch_id: str, ending: str) -> BatchRun | None:
        """A batch is to end before its rows have run.

        Returns:
            The batch, where the engine does not have it: it is the caller's now. None where the engine's thread will end it, or
            nobody has it.
        """
        with self._changed:
            run = self._runs.get(batch_id)
            if run is None:
                return None
            run.ending = run.ending or ending
            if run.in_engine:
                self._changed.notify_all()
                return None
            return self._runs.pop(batch_id)

    @property
    def requests(self) -> tuple[int, int]:
        """How many online requests wait, and how many run."""
        with self._changed:
            return len(self._waiting), len(self._running)

    def stop(self) -> None:
        """The server stops: nothing more is taken."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    # What the engine's thread takes.

    @property
    def is_stopping(self) -> bool:
        """Whether the server stops."""
        return self._stopping

    def next_model(self, loaded: str | None) -> str | None:
        """Waits for the next turn; None when the server stops."""
        with self._changed:
            while not self._stopping:
                turn = turn_of(self._items(), loaded)
                if turn is not None:
                    return turn.model
                self._changed.wait()
        return None

    def waiting_for(self, model: str) -> list[BatchRun]:
        """The batches that wait for a model."""
        with self._changed:
            return [run for run in self._runs.values() if run.model == model]

    def view(self, model: str, *, may_leave: bool, fits: frozenset[str], room_tokens: int, idle: bool) -> View:
        """What the turn of a model asks for now; batches and online requests in it are the engine's from now on.

        Args:
            may_leave: whether the model has been loaded for long enough.
            fits: batches that the engine was planned for.
            room_tokens: of the longest row that the engine has room for.
            idle: nothing is in the engine: then wait for something to do.
        """
        with self._changed:
            if self._switch is not None and self._switch.model == model:
                self._switch = None
            while True:
                view = self._view(model, may_leave, fits, room_tokens)
                if not idle or view.leave or view.requests or view.batches or view.ended or view.dropped:
                    return view
                # A switch may become due by time alone.
                self._changed.wait(0.5 if self._items() else None)
                if self._switch is not None and self._switch.model == model:
                    self._switch = None
                may_leave = may_leave or idle

    def _view(self, model: str, may_leave: bool, fits: frozenset[str], room_tokens: int) -> View:
        turn = turn_of(self._items(), model, may_leave=may_leave) or Turn(model=model)
        runs = [self._runs[name] for name in turn.batches] if turn.model == model else []
        suited = list(itertools.takewhile(lambda run: run.id in fits or run.needed_tokens <= room_tokens, runs))
        leave = self._stopping or turn.model != model or (bool(runs) and not suited and may_leave)
        ended = tuple(run for run in self._runs.values() if run.in_engine and run.ending is not None)
        dropped = tuple(request for request in self._running if request.is_dropped)
        requests = [] if leave else [request for request in self._waiting if request.model == model]
        for request in requests:
            self._waiting.remove(request)
        self._running += requests
        batches = [] if leave else [run for run in suited if run.ending is None]
        for run in batches:
            run.in_engine = True
        return View(leave=leave, requests=tuple(requests), dropped=dropped, batches=tuple(batches), ended=ended)

    def done(self, request: OnlineRequest) -> None:
        """The engine is done with an online request."""
        with self._changed:
            if request in self._running:
                self._running.remove(request)

    def take(self, run: BatchRun) -> None:
        """A batch leaves the work queue: its rows have ended."""
        with self._changed:
            self._runs.pop(run.id, None)

    def release(self) -> list[BatchRun]:
        """The turn is over: the engine has none of the batches any longer.

        Returns:
            Those that are to end, which meanwhile only the engine's thread could have done; they are the caller's.
        """
        with self._changed:
            for run in self._runs.values():
                run.in_engine = False
            ended = [run for run in self._runs.values() if run.ending is not None]
            for run in ended:
                del self._runs[run.id]
            return ended

    def fail_requests(self, failure: RequestFailure, *, waiting: bool = False) -> None:
        """Ends the online requests that run, and those that wait, too, where that is asked.

        Args:
            failure: what they are told.
        """
        with self._changed:
            failed, self._running = self._running, []
            if waiting:
                failed, self._waiting = failed + self._waiting, []
        for request in failed:
            request.fail(failure)

    def fail_requests_of(self, model: str, failure: RequestFailure) -> None:
        """Ends the online requests that wait for a model which cannot be loaded."""
        with self._changed:
            failed = [request for request in self._waiting if request.model == model]
            self._waiting = [request for request in self._waiting if request.model != model]
        for request in failed:
            request.fail(failure)

    def forget_switch(self, model: str) -> None:
        """Nobody waits for a model to be loaded any longer."""
        with self._changed:
            if self._switch is not None and self._switch.model == model:
                self._switch = None

    def pause(self, seconds: float = 1.0) -> None:
        """Waits, unless the server stops meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, seconds)

    def _items(self) -> list[Item]:
        items = [Item(model=request.model, arrival=request.arrival) for request in self._waiting]
        items += [self._switch] if self._switch is not None else []
        for run in self._runs.values():
            record = run.record
            items.append(
                Item(
                    model=run.model,
                    arrival=record.seq,
                    name=run.id,
                    priority=record.priority,
                    has_begun=run.in_engine,
                )
            )
        return items
