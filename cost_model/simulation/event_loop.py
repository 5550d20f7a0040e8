"""The loop of a replay: threads that work their operations off in order, each at the speed that the others leave it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cost_model.simulation.program import Program, Step, Task
from cost_model.simulation.threads import COPY, COUNT, MAIN, STREAM, STREAM_USER, TASK_THREADS, USER_BIT, WAKES
from cost_model.simulation.weight_queues import WeightQueues
from cost_model.timing.contention import USERS

_NEVER = float("inf")
#: By a mask of those who work (bits by place in `USERS`), their speeds by place; None where all have the speed 1.
Speeds = Mapping[int, "tuple[float, ...] | None"]
#: (user, name, start, end, bytes) of an operation.
Record = Callable[[str, str, float, float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """How far the weight stream may run ahead: slots, and staging slots."""

    slots: int
    staging_slots: int


class EventLoop:
    """Replays sweep after sweep.

    Args:
        queues: the weight stream.
        buffers: its slots.
        speeds: how fast operations get on beside others.
        op_s: dispatch of one operation.
        record: called with every operation when it has ended.

    Attributes:
        now: seconds since the start.
        active_s: seconds in which exactly the users of a mask (bits by place in `USERS`) were at work, since `sweep`
            began.
    """

    def __init__(
        self, queues: WeightQueues, buffers: Buffers, speeds: Speeds, op_s: float, record: Record | None = None
    ):
        self._speeds, self._op_s, self._record = speeds, op_s, record
        self._follow(queues, buffers)
        self.now = 0.0
        self.active_s: dict[int, float] = {}
        self._mask, self._slowed = 0, False
        self._finish, self._speed, self._user = [_NEVER] * COUNT, [1.0] * COUNT, [0] * COUNT
        self._started, self._name, self._bytes = [0.0] * COUNT, [""] * COUNT, [0.0] * COUNT
        #: Operations done by thread and, of the weight stream, slots given back and staging slots emptied: all of them
        #: counted from the start of the sweep, so that what was prefetched for it counts already.
        self._done, self._submitted = [0] * COUNT, [0] * COUNT
        self._freed = self._unstaged = 0

    def sweep(self, program: Program, seconds: Sequence[float], nbytes: Sequence[float] = ()) -> None:
        """Replay one sweep; afterwards only the weight stream is at work.

        Args:
            program: what is done.
            seconds, nbytes: the tables that it points into; no bytes when nothing is recorded.
        """
        self._program, self._seconds, self._nbytes = program, seconds, nbytes
        self._steps, self._at, self._part = program.steps, 0, [0] * COUNT
        self.active_s = active_s = defaultdict[int, float](float)
        self._reach_step(self._steps[0])
        self._move_ahead()
        finish, known, steps = self._finish, self._speeds, len(self._steps)
        while self._at < steps:
            speeds = known[self._mask]
            if speeds is not None or self._slowed:
                self._set_speeds(speeds)
            end = min(finish)
            if end == _NEVER:
                raise RuntimeError(f"the replay stands still before {self._steps[self._at].name}")
            active_s[self._mask] += end - self.now
            self.now = end
            thread = finish.index(end)
            finish[thread] = _NEVER
            self._mask &= ~(1 << self._user[thread])
            self._end(thread)
        self._next_sweep()

    def turn_to(self, queues: WeightQueues, buffers: Buffers) -> None:
        """From the next sweep on the weight stream is another one; what the old one has moved ahead is lost."""
        if queues is self._queues:
            return
        self._follow(queues, buffers)
        for thread in STREAM:
            if self._finish[thread] != _NEVER:
                self._mask &= ~(1 << self._user[thread])
                self._finish[thread] = _NEVER
            self._done[thread] = 0
        self._freed = self._unstaged = 0

    def _follow(self, queues: WeightQueues, buffers: Buffers) -> None:
        self._queues, self._buffers, self._moves = queues, buffers, queues.moves
        self._streams = [thread for thread in STREAM if queues.moves[thread]]

    def _set_speeds(self, speeds: tuple[float, ...] | None) -> None:
        """What runs continues at the speed that the others leave it."""
        now, finish, speed, user = self.now, self._finish, self._speed, self._user
        for thread, end in enumerate(finish):
            if end != _NEVER:
                new = 1.0 if speeds is None else speeds[user[thread]]
                if new != speed[thread]:
                    finish[thread] = now + (end - now) * speed[thread] / new
                    speed[thread] = new
        self._slowed = speeds is not None

    def _begin(self, thread: int, user: str, seconds: float) -> None:
        place = USER_BIT[user]
        self._user[thread], self._speed[thread] = place, 1.0
        self._mask |= 1 << place
        self._finish[thread] = self.now + seconds
        self._started[thread] = self.now

    def _end(self, thread: int) -> None:
        if self._record is not None:
            user = USERS[self._user[thread]]
            self._record(user, self._name[thread], self._started[thread], self.now, self._bytes[thread])
        if thread == MAIN:
            self._end_step()
        elif thread in WAKES:
            self._end_part(thread)
        else:
            self._end_move(thread)

    def _reach_step(self, step: Step) -> None:
        for thread in step.handed_on:
            self._submitted[thread] += 1
            self._run_task(thread)
        self._compute(step)

    def _compute(self, step: Step) -> None:
        """Begin the step that the main thread has reached and not begun, unless it waits for somebody."""
        done = self._done
        for thread, count in step.after:
            if done[thread] < count:
                return
        if self._record is not None:
            self._name[MAIN], self._bytes[MAIN] = step.name, self._nbytes[step.seconds]
        self._begin(MAIN, step.user, self._seconds[step.seconds] * step.times + step.dispatched * self._op_s)

    def _end_step(self) -> None:
        if self._steps[self._at].frees:
            self._freed += 1
            self._move_ahead()
        self._at += 1
        if self._at < len(self._steps):
            self._reach_step(self._steps[self._at])

    def _run_task(self, thread: int) -> None:
        at, done = self._done[thread], self._done
        if self._finish[thread] != _NEVER or at >= self._submitted[thread]:
            return
        task = self._program.tasks[thread][at]
        for other, count in task.after:
            if done[other] < count:
                return
        self._part[thread] = 0
        self._begin_part(thread, task)

    def _begin_part(self, thread: int, task: Task) -> None:
        user, place = task.parts[self._part[thread]]
        if self._record is not None:
            self._name[thread], self._bytes[thread] = task.name, self._nbytes[place]
        self._begin(thread, user, self._seconds[place])

    def _end_part(self, thread: int) -> None:
        task = self._program.tasks[thread][self._done[thread]]
        self._part[thread] += 1
        if self._part[thread] < len(task.parts):
            self._begin_part(thread, task)
            return
        self._done[thread] += 1
        self._run_task(thread)
        for other in WAKES[thread]:
            self._run_task(other)
        if self._finish[MAIN] == _NEVER:
            self._compute(self._steps[self._at])

    def _move_ahead(self) -> None:
        for thread in self._streams:
            if self._finish[thread] == _NEVER:
                self._move_next(thread)

    def _move_next(self, thread: int) -> None:
        """Begin the next move of a thread that rests, if there is a slot for it and, where it is staged, it has been."""
        moves = self._moves[thread]
        ahead, at = divmod(self._done[thread], len(moves))
        move = moves[at]
        if thread != COPY and move.staged >= 0:
            if move.staged + ahead * self._queues.staged >= self._unstaged + self._buffers.staging_slots:
                return
        elif move.place + ahead * self._queues.units >= self._freed + self._buffers.slots:
            return
        elif move.staged_by is not None:
            other, place = move.staged_by
            if self._done[other] <= place + ahead * len(self._moves[other]):
                return
        if self._record is not None:
            self._name[thread], self._bytes[thread] = move.name, move.nbytes
        self._begin(thread, STREAM_USER[thread], move.seconds)

    def _end_move(self, thread: int) -> None:
        moves = self._moves[thread]
        if thread == COPY and moves[self._done[thread] % len(moves)].staged >= 0:
            self._unstaged += 1
        self._done[thread] += 1
        self._move_ahead()
        if self._finish[MAIN] == _NEVER:
            self._compute(self._steps[self._at])

    def _next_sweep(self) -> None:
        for thread in TASK_THREADS:
            self._done[thread] = self._submitted[thread] = 0
        for thread in STREAM:
            self._done[thread] -= len(self._moves[thread])
        self._freed -= self._queues.units
        self._unstaged -= self._queues.staged
