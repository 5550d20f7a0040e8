"""One process per thing measured, so that memory, threads and caches of one do not disturb another.

The parent asks with a line of JSON, the worker answers with one; what libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker failed; the message says which one and why."""


class Worker:
    """A running `python -m module`, asked for one operation at a time.

    Args:
        module: a module whose main calls `serve`.
    """

    def __init__(self, module: str):
        self._module = module
        threads = str(os.cpu_count())
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, op: str, **arguments) -> dict:
        """The worker's answer to an operation.

        Raises:
            WorkerError: the operation failed, or the process ended.
        """
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"{self._module} ended before {op}") from error
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self._module} ended with code {self._process.wait()} during {op}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self._module} {op}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let the worker end; kill it when it does not."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def serve(operations: Mapping[str, Callable[..., dict | None]]) -> None:
    """Answer requests from stdin until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("op")](**request) or {}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
