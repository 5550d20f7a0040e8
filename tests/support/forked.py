"""Programs in processes of their own, forked from this one: it has loaded torch and transformers already."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


class Forked:
    """A process that runs a program; what it prints is in two files.

    Args:
        program: returns, or raises `SystemExit` with the code that the process ends with; any other exception is 1 and its trace.
        directory: of the two files.
        cwd: where it runs; here by default.
    """

    def __init__(self, program: Callable[[], object], directory: Path, cwd: Path | None = None):
        self._files = [directory / "stdout.txt", directory / "stderr.txt"]
        self.process = os.fork()
        if self.process == 0:
            self._run(program, cwd)

    def _run(self, program: Callable[[], object], cwd: Path | None) -> None:
        code = 1
        try:
            for descriptor, path in enumerate(self._files, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
            logging.getLogger().handlers.clear()  # those are pytest's
            os.chdir(cwd or ".")
            code = _code_of(program)
        finally:
            os._exit(code)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, timeout_s: float = 120.0) -> tuple[int, str, str]:
        """Exit code, standard output and standard error once it has ended; it is killed after so many seconds."""
        end = time.monotonic() + timeout_s
        while self.is_running():
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return (code, *(path.read_text("utf-8") for path in self._files))


def _code_of(program: Callable[[], object]) -> int:
    try:
        program()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - nothing may go on in a copy of the test
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0
