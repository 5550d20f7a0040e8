"""A sweep as the runtime's threads see it: what each does in turn, and what it waits for.

Made from `policies.schedule.sweep`, once per shape of a sweep. The main thread issues the operations in order and
computes those of the lane ``gpu``; the others it hands to the thread of their lane. An operation is thus known by its
thread and its place there, and "after it" is "that thread has done so many". On device cpu it does itself what KV takes, right
before a GPU batch is attended, and moves hidden states (`policies.schedule.is_moved_at_once`); only the disk is at work beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import head_chunks
from cost_model.simulation.op_tables import batch_place, head_place, sweep_place
from cost_model.simulation.threads import (
    ACT,
    ATTENDED,
    BOOKS,
    BROUGHT,
    COUNT,
    CPU,
    DEMANDED,
    KV,
    NOT_DISPATCHED,
    STORE,
    WRITE,
)
from cost_model.simulation.weight_queues import WeightQueues
from policies.schedule import Op, SweepShape, is_moved_at_once, sweep

#: Thread of each operation that the main thread hands on, and its parts: (user of `Resources`, seconds), in turn.
_HANDED_ON = {
    "load_kv": (KV, (("disk_read/kv", "read_kv"), ("h2d/kv", "load_kv"))),
    "store_kv": (STORE, (("d2h", "store_kv"),)),
    "write_kv": (WRITE, (("disk_write", "write_kv"),)),
    "cpu_attend": (CPU, (("cpu", "cpu_attend"),)),
    "load_act": (ACT, (("disk_read/wait", "disk_wait"), ("disk_read/act", "read_act"), ("h2d/act", "load_act"))),
    "store_act": (ACT, (("d2h/act", "store_act"), ("disk_write/wait", "disk_wait"), ("disk_write/act", "write_act"))),
    "read_routed": (DEMANDED, (("disk_read/routed", "read_routed"),)),
    "copy_routed": (BROUGHT, (("h2d/routed", "copy_routed"),)),
}
#: A store waits until the write that used its buffer before has ended.
_WRITE_BUFFERS = 2
#: What must have been done before: (thread, operations of this sweep that it must have done).
_After = tuple[tuple[int, int], ...]
_TASK_NAMES = {"cpu_attend": "attend", "read_routed": "experts", "copy_routed": "experts"}
_OF_HIDDEN_STATES = ("load_act", "store_act")
_OF_KV = ("load_kv", "store_kv", "write_kv", "cpu_attend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation of the main thread.

    Attributes:
        op: of the schedule.
        user: of `Resources`.
        seconds: place in the table of seconds.
        handed_on: threads that get an operation just before, in order.
        times: operations like it that follow at once, as nobody waits for anything between them, itself included.
        dispatched: operations that the main thread dispatches for it, themselves included.
        after: (thread, operations of this sweep that it must have done), with those of the weight stream.
        unit: the streamed unit that it computes with, as (thread, place there) that brings it; None: it is resident.
        frees: slots that are free after it, 0 or 1.
    """

    op: Op | None
    user: str
    seconds: int
    handed_on: tuple[int, ...]
    dispatched: int
    after: _After
    times: int = 1
    unit: tuple[int, int] | None = None
    frees: int = 0

    @property
    def name(self) -> str:
        """As in a trace."""
        if self.op is None:
            return self.user
        return f"{self.op.kind} {self.op.unit or self.op.layer}" if self.op.lane == "gpu" else _moved(self.op)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One operation of another thread: ``parts`` are (user, place in the table of seconds), one after the other."""

    name: str
    parts: tuple[tuple[str, int], ...]
    after: _After


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A sweep: the main thread's steps, and by thread the tasks."""

    steps: tuple[Step, ...]
    tasks: tuple[tuple[Task, ...], ...]


def compile_sweep(
    arch: ModelArch, shape: SweepShape, queues: WeightQueues, *, device: str, one_by_one: bool = True
) -> Program:
    """The program of a sweep. Its last step is the host's work between two sweeps, when all new KV is home.

    Args:
        device: that computes.
        one_by_one: no operations of the main thread are joined to one step.
    """
    program = _Compiler(arch, shape, queues, device).program()
    return program if one_by_one else Program(steps=tuple(_joined(program.steps)), tasks=program.tasks)


def _joined(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps; of those that are alike, like a layer's experts that live on the device, one that stands for all."""
    for key, alike in groupby(steps, key=attrgetter("handed_on", "after", "frees", "user", "seconds")):
        if any(key[:3]):  # somebody waits between them
            yield from alike
        else:
            first, *others = alike
            times, dispatched = 1 + len(others), sum(each.dispatched for each in (first, *others))
            yield replace(first, times=times, dispatched=dispatched) if others else first


class _Compiler:
    def __init__(self, arch: ModelArch, shape: SweepShape, queues: WeightQueues, device: str):
        self._arch, self._shape, self._brought_by, self._device = arch, shape, queues.brought_by, device
        self._chunks, self._last = head_chunks(arch), len(shape.units.attention) - 1
        self._steps: list[Step] = []
        self._tasks: list[list[Task]] = [[] for _ in range(COUNT)]
        #: By operation, (thread, how many it has done when that is done).
        self._done: dict[int, tuple[int, int]] = {}
        self._handed: list[int] = []
        #: By layer and GPU batch, what the main thread does before it is attended there.
        self._deferred = defaultdict[tuple[int, int], list[Op]](list)

    def program(self) -> Program:
        for op in sweep(self._shape):
            if op.lane == "gpu":
                self._compute(op)
            elif op.kind not in ("read", "copy"):  # of these the weight stream is ahead
                self._hand_on(op)
        before = tuple((thread, len(self._tasks[thread])) for thread in (STORE, WRITE, BOOKS) if self._tasks[thread])
        self._steps.append(
            Step(op=None, user="host", seconds=sweep_place("host"), handed_on=(), dispatched=0, after=before)
        )
        return Program(steps=tuple(self._steps), tasks=tuple(map(tuple, self._tasks)))

    def _compute(self, op: Op) -> None:
        if op.kind == "attend":
            for moved in self._deferred.pop((op.layer, op.batch), ()):
                self._move(moved)
        if op.kind == "routed":  # what is cached, or comes earlier, is computed while the last one comes
            self._step(op, sweep_place("routed"), after=())
            self._step(op, sweep_place("routed_last"), after=self._latest(op.deps))
            return
        used = self._shape.units.attention[op.layer].unit if op.kind == "project" else op.unit
        unit = self._brought_by.get(used) if used is not None else None
        frees = int(op.releases is not None and op.releases in self._brought_by)
        arrived = () if unit is None else ((unit[0], unit[1] + 1),)
        self._step(op, self._place(op), after=(*self._latest(op.deps), *arrived), unit=unit, frees=frees)
        if op.kind == "route" and op.half and op.layer == self._last and self._shape.first_part:
            self._tasks[BOOKS].append(Task(name="book", parts=(("host", sweep_place("booked")),), after=()))
            self._handed.append(BOOKS)

    def _step(
        self,
        op: Op,
        seconds: int,
        *,
        after: _After,
        unit: tuple[int, int] | None = None,
        frees: int = 0,
        user: str = "gpu",
    ) -> None:
        handed = tuple(self._handed)
        dispatched = 1 + sum(thread not in NOT_DISPATCHED for thread in handed)
        self._steps.append(
            Step(
                op=op,
                user=user,
                seconds=seconds,
                handed_on=handed,
                dispatched=dispatched,
                after=after,
                unit=unit,
                frees=frees,
            )
        )
        self._handed.clear()

    def _place(self, op: Op) -> int:
        if op.batch >= 0:
            return batch_place(self._chunks, op.batch, op.kind)
        if op.kind == "head" and op.unit is not None:
            return head_place(self._chunks, op.half, op.unit.first)
        kind = "dense" if op.kind == "expert" and self._arch.is_dense(op.layer) else op.kind
        return sweep_place(f"second_{kind}" if op.kind in ("expert", "sample") and op.half else kind)

    def _hand_on(self, op: Op) -> None:
        thread, parts = _HANDED_ON[op.kind]
        parts = tuple(part for part in parts if self._takes_part(part[0], op))
        if self._device == "cpu" and op.kind in _OF_KV:
            if op.kind == "load_kv" and len(parts) > 1:  # the disk's part begins at once
                self._add(op, thread, _moved(op), parts[:1], ())
            self._deferred[op.layer, op.batch].append(op)
            return
        if op.kind in _OF_HIDDEN_STATES and is_moved_at_once(self._device, self._shape.activation_tiers[op.batch]):
            self._move(op)
            return
        after = [] if thread == BROUGHT else list(self._latest(op.deps))
        if thread == STORE and op.batch in self._shape.disk_batches:
            buffer_free = len(self._tasks[WRITE]) - _WRITE_BUFFERS + 1
            after += [(WRITE, buffer_free)] if buffer_free > 0 else []
        name = _moved(op)
        self._add(op, thread, name, parts, after)
        if thread == BROUGHT:  # each is copied when it has been read, so only the last one's copy waits for all of them
            self._add(op, BROUGHT, name, [("h2d/routed", "copy_last")], self._latest(op.deps))
        if thread == CPU:
            self._add(op, ATTENDED, name, [("h2d/attended", "attended")], [self._done[op.id]])

    def _move(self, op: Op) -> None:
        """The main thread does what is another lane's; only writing to disk it hands on."""
        thread, parts = _HANDED_ON[op.kind]
        if op.kind == "write_kv":
            self._add(op, thread, _moved(op), parts, ())
            return
        [(user, seconds)] = [part for part in parts if not part[0].startswith("disk")]
        read = self._done.get(op.id)
        self._step(op, self._part_place(op, seconds), after=(read,) if read else (), user=user)

    def _add(
        self, op: Op, thread: int, name: str, parts: Sequence[tuple[str, str]], after: Iterable[tuple[int, int]]
    ) -> None:
        at = tuple((user, self._part_place(op, seconds)) for user, seconds in parts)
        self._tasks[thread].append(Task(name=name, parts=at, after=tuple(after)))
        self._done[op.id] = (thread, len(self._tasks[thread]))
        self._handed.append(thread)

    def _part_place(self, op: Op, seconds: str) -> int:
        of_batch = op.batch >= 0 and seconds != "disk_wait"
        return batch_place(self._chunks, op.batch, seconds) if of_batch else sweep_place(seconds)

    def _takes_part(self, user: str, op: Op) -> bool:
        if user.startswith("disk") and op.kind in ("load_act", "store_act"):
            return self._shape.activation_tiers[op.batch] == "disk"
        return user != "disk_read/kv" or op.batch in self._shape.disk_batches

    def _latest(self, deps: Sequence[int]) -> _After:
        """What other threads must have done; of several operations of a thread, the last."""
        latest: dict[int, int] = {}
        for thread, count in (self._done[dep] for dep in deps if dep in self._done):
            latest[thread] = max(count, latest.get(thread, 0))
        return tuple(latest.items())


def _moved(op: Op) -> str:
    """The name of an operation of another lane, as in a trace."""
    return f"act {op.batch}" if op.kind in _OF_HIDDEN_STATES else f"{_TASK_NAMES.get(op.kind, 'kv')} {op.layer}"
