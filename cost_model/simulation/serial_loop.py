"""The loop of a replay without overlap: one operation at a time, a weight unit only when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from cost_model.simulation.event_loop import Buffers, Record, Speeds
from cost_model.simulation.program import Program, Step, Task
from cost_model.simulation.threads import COUNT, STREAM_USER, USER_BIT
from cost_model.simulation.weight_queues import Move, WeightQueues


class SerialLoop:
    """As `EventLoop`, for a policy whose ``overlap`` is off; slots do not matter, as one unit is moved at a time."""

    def __init__(
        self, queues: WeightQueues, buffers: Buffers, speeds: Speeds, op_s: float, record: Record | None = None
    ):
        self._queues, self._speeds, self._op_s, self._record = queues, speeds, op_s, record
        self.now = 0.0
        self.active_s: dict[int, float] = {}

    def sweep(self, program: Program, seconds: Sequence[float], nbytes: Sequence[float] = ()) -> None:
        """As `EventLoop.sweep`."""
        self.active_s = {}
        handed = [0] * COUNT
        brought: set[tuple[int, int]] = set()
        for step in program.steps:
            for thread in step.handed_on:
                task = program.tasks[thread][handed[thread]]
                handed[thread] += 1
                for user, place in task.parts:
                    self._spend(user, task, seconds[place], nbytes[place] if nbytes else 0.0)
            if step.unit is not None and step.unit not in brought:
                brought.add(step.unit)
                self._bring(*step.unit)
            spent_s = seconds[step.seconds] * step.times + step.dispatched * self._op_s
            self._spend(step.user, step, spent_s, nbytes[step.seconds] if nbytes else 0.0)

    def turn_to(self, queues: WeightQueues, buffers: Buffers) -> None:
        """As `EventLoop.turn_to`; nothing has been moved ahead."""
        self._queues = queues

    def _bring(self, thread: int, place: int) -> None:
        move = self._queues.moves[thread][place]
        if move.staged_by is not None:
            by, at = move.staged_by
            first = self._queues.moves[by][at]
            self._spend(STREAM_USER[by], first, first.seconds, first.nbytes)
        self._spend(STREAM_USER[thread], move, move.seconds, move.nbytes)

    def _spend(self, user: str, what: Step | Task | Move, seconds: float, nbytes: float) -> None:
        mask, start = 1 << USER_BIT[user], self.now
        speeds = self._speeds[mask]
        spent = seconds if speeds is None else seconds / speeds[USER_BIT[user]]
        self.now += spent
        self.active_s[mask] = self.active_s.get(mask, 0.0) + spent
        if self._record is not None:
            self._record(user, what.name, start, self.now, nbytes)
