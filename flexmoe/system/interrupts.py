"""Ctrl-C, SIGTERM and SIGHUP: a job finishes the sweep that is running, everything else ends at once.

Batch systems send SIGTERM some time before they kill, a terminal that is closed sends SIGHUP, and a user who presses
Ctrl-C once has no reason to lose what the sweep has computed. Who presses it twice has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from flexmoe.errors import FlexMoEError
from policies.common.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

EXIT_CODES = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGHUP: EXIT_TERMINATED,
}


class Interrupted(FlexMoEError):
    """The job stopped because it was asked to; the same command resumes it.

    Args:
        signal_number: who asked, one of `EXIT_CODES`.
        done: what has been done, for the sentence.
    """

    def __init__(self, signal_number: int, done: str) -> None:
        super().__init__(f"interrupted: {done}; the same command resumes it")
        self.exit_code = EXIT_CODES[signal.Signals(signal_number)]


class Terminated(BaseException):
    """SIGTERM or SIGHUP where there was nothing to finish; like KeyboardInterrupt, no `except Exception` may hold it up."""


def exit_at_signals() -> None:
    """Has signals end the process at once, with their exit codes: for the seconds in which a program imports."""

    def leave(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"flexmoe: stopped before it began\n")
        os._exit(EXIT_CODES[signal.Signals(number)])

    for number in _taken():
        signal.signal(number, leave)


def _taken() -> list[signal.Signals]:
    """The signals to take: who starts a program with nohup wants it to outlive the terminal."""
    return [n for n in EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


class Interrupts:
    """Takes the signals of `EXIT_CODES` as long as it is entered; outside the main thread it takes none.

    Attributes:
        pending: the signal that came while signals were put off; None before.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._put_off = False

    def __enter__(self) -> Interrupts:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _taken()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Inside, the first signal is only noted in `pending`; the second one acts at once."""
        self._put_off = True
        try:
            yield
        finally:
            self._put_off = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._put_off and self.pending is None:
            self.pending = number
            with contextlib.suppress(OSError, RuntimeError):  # a handler may run in the middle of another write
                sys.stderr.write("flexmoe: stopping after this sweep; once more stops at once\n")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated
