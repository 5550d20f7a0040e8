"""The one family of errors a user sees, and every exit code; the command lines map an error to its code and a single sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERNAL = 1  #: a fault of the program
EXIT_USAGE = 2  #: a flag or its value
EXIT_ROWS_FAILED = 3  #: finished, and some rows failed
EXIT_INFEASIBLE = 4  #: no policy fits, another model, memory ran out
EXIT_DATA = 65  #: input data or a checkpoint is malformed
EXIT_INPUT_MISSING = 66  #: an input is missing
EXIT_IO = 74  #: an I/O error, a full disk
EXIT_TERMINATED = 75  #: stopped by SIGTERM or SIGHUP, and resumable
EXIT_INTERRUPTED = 130  #: stopped by Ctrl-C, and resumable


class FlexMoEError(Exception):
    """Base of every error that is meant for a user: its text is a sentence, its class an exit code."""

    exit_code = EXIT_INTERNAL


class UsageError(FlexMoEError):
    """A flag or an argument has a value that cannot be used."""

    exit_code = EXIT_USAGE


class InfeasibleError(FlexMoEError):
    """The policy does not fit: another model, a smaller machine, or no room in a tier."""

    exit_code = EXIT_INFEASIBLE


class DataError(FlexMoEError):
    """Input data or a checkpoint is malformed."""

    exit_code = EXIT_DATA


class InputMissingError(FlexMoEError):
    """An input file or directory does not exist or cannot be read."""

    exit_code = EXIT_INPUT_MISSING


class StorageError(FlexMoEError):
    """Reading or writing failed: an I/O error, or a full or read-only disk."""

    exit_code = EXIT_IO


class Faults:
    """What is wrong with something that is checked in steps: the first fault is raised, unless all are to be found.

    Args:
        keep: keep what a step raises, so that the next one follows.

    Attributes:
        found: what was kept, each sentence once.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self.found: list[FlexMoEError] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """A check that does not depend on others; its error is raised or kept."""
        try:
            yield
        except FlexMoEError as error:
            if not self._keep:
                raise
            if str(error) not in map(str, self.found):
                self.found.append(error)
