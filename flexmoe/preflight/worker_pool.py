"""Work divided among processes that speak JSON lines, and that may crash or hang without taking the job with them.

A worker is a program of its own (``python -m MODULE``): it gets one line that sets it up, then a line for each task, and
answers each with a line. Whoever starts one needs no ``if __name__ == "__main__"``, and no lock or device of the parent
is inherited.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError, FlexMoEError

_READ_BYTES = 1 << 20
#: A worker imports the tokenizer's libraries first, which takes seconds, and on a busy disk a minute.
START_LIMIT_S = 300.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is to do, as JSON values, and the seconds after which it is taken for hung."""

    work: Any
    limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A task's result, or the sentence that says why there is none."""

    task: Task
    result: Any = None
    lost: str | None = None


class _Worker:
    """One process, and the task that it has."""

    def __init__(self, module: str, setup: Any, task: Task) -> None:
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the parent, who then ends its workers
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a worker was started without pipes")
        self._questions, self.answers = self.process.stdin, self.process.stdout
        self.task, self.is_busy = task, True
        self.ready = False
        self._parts: list[bytes] = []
        self.deadline = time.monotonic() + START_LIMIT_S
        self._send(setup)

    def give(self, task: Task) -> None:
        """Hands over a task; its clock starts now."""
        self.task, self.is_busy = task, True
        self.deadline = time.monotonic() + task.limit_s
        self._send(task.work)

    def read(self) -> tuple[bool, Any]:
        """(whether it lives, its answer where one is complete)."""
        piece = os.read(self.answers.fileno(), _READ_BYTES)
        self._parts.append(piece)
        if not piece.endswith(b"\n"):  # one answer at a time: nothing follows its line end
            return bool(piece), None
        line, self._parts = b"".join(self._parts), []
        return True, json.loads(line)

    def end(self) -> int:
        """Ends the process; returns its exit status."""
        self.process.kill()
        with contextlib.suppress(OSError):
            self._questions.close()
        self.answers.close()
        return self.process.wait()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and the next read from it shows that
            self._questions.write(json.dumps(message).encode() + b"\n")
            self._questions.flush()


class WorkerPool:
    """Runs tasks in several workers.

    Args:
        module: the program of a worker, which calls `serve`.
        setup: the JSON values that every worker is set up with.
        count: most workers at once.
    """

    def __init__(self, module: str, setup: Any, count: int) -> None:
        self._module, self._setup, self._count = module, setup, count
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self, next_task: Callable[[], Task | None]) -> Iterator[Answer]:
        """Yields every task's answer, in any order.

        Args:
            next_task: asked whenever a worker is free; None when there is nothing to do, for now or for good. The run is
                over when it says so while no worker is busy.

        Raises:
            DataError: a worker refuses its setup or a task.
            RuntimeError: workers cannot be started, or a task failed in a way that no worker expects.
        """
        while True:
            while len(self._workers) < self._count and (task := next_task()):
                self._start(task)
            if not self._workers:
                return
            yield from self._wait(next_task)

    def close(self) -> None:
        """Ends all workers; a second call does nothing."""
        while self._workers:
            self._end(self._workers[0])
        self._selector.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, task: Task) -> None:
        worker = _Worker(self._module, self._setup, task)
        self._workers.append(worker)
        self._selector.register(worker.answers, selectors.EVENT_READ, worker)

    def _wait(self, next_task: Callable[[], Task | None]) -> Iterator[Answer]:
        """Waits for something to happen, and deals with it."""
        patience = max(0.0, min(worker.deadline for worker in self._workers) - time.monotonic())
        for key, _ in self._selector.select(patience):
            worker = key.data
            lives, message = worker.read()
            if not lives:
                yield self._lose(worker, "the process that worked on it died")
            elif message is not None:
                yield from self._take(worker, message)
                self._next(worker, next_task)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.deadline <= now]:
            yield self._lose(worker, f"it took longer than {worker.task.limit_s:.0f} s")

    def _take(self, worker: _Worker, message: dict[str, Any]) -> Iterator[Answer]:
        if "refused" in message:
            raise DataError(message["refused"])
        if "failed" in message:
            raise RuntimeError(f"a worker failed: {message['failed']}")
        if worker.ready:
            yield Answer(task=worker.task, result=message["result"])
            worker.is_busy = False
        else:
            worker.ready = True
            worker.give(worker.task)

    def _next(self, worker: _Worker, next_task: Callable[[], Task | None]) -> None:
        if worker.is_busy:
            return
        task = next_task()
        if task is None:
            self._end(worker)
        else:
            worker.give(task)

    def _lose(self, worker: _Worker, why: str) -> Answer:
        task, ready = worker.task, worker.ready
        status = self._end(worker)
        if not ready:
            raise RuntimeError(f"the processes that prepare the rows do not start (exit status {status}); see above")
        return Answer(task=task, lost=why)

    def _end(self, worker: _Worker) -> int:
        self._selector.unregister(worker.answers)
        self._workers.remove(worker)
        return worker.end()


def serve(start: Callable[[Any], Callable[[Any], Any]]) -> None:
    """The main loop of a worker's program, until its parent closes the pipe.

    Args:
        start: from the setup to what does a task.
    """
    _die_with_parent()
    # Libraries that print would otherwise speak into the answers.
    answers, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    try:
        work = start(json.loads(sys.stdin.buffer.readline()))
        answer({"ready": True})
        for line in sys.stdin.buffer:
            answer({"result": work(json.loads(line))})
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
    except FlexMoEError as error:
        answer({"refused": str(error)})
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
        answer({"failed": f"{type(error).__name__}: {error}"})


def _die_with_parent() -> None:
    """Has the kernel end this process when its parent dies, however it dies: a worker at its task would not see it for
    minutes. One whose parent is dead already finds its pipe closed."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux alone has it
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
