"""What all command lines share: flags that are checked while they are parsed, and one map from errors to exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Literal, NoReturn, TextIO

from policies.common.checks import check_number, check_percent
from policies.common.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_IO, FlexMoEError, UsageError
from policies.common.option_names import as_flags

#: A pipe whose reader is gone, a terminal that is.
_NO_READER = (errno.EPIPE, errno.EIO)
_DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that one place maps errors to exit codes."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def program_name(command: str, module: str) -> str:
    """What was typed to get here: ``flexmoe run`` or ``python -m flexmoe.run``.

    Args:
        command: the word after ``flexmoe``.
        module: the one that ``python -m`` runs.
    """
    return f"flexmoe {command}" if os.path.basename(sys.argv[0]) == "flexmoe" else f"python -m {module}"


def do_without_torch() -> None:
    """For a program that only tokenizes: transformers wants torch for models alone, and it would double the time and the
    memory of the start."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it is not there
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def flag(text: str) -> bool:
    """true or false, in the usual spellings."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def percent(text: str) -> float:
    """A number from 0 to 100; 0 is a value."""
    try:
        return check_percent("", float(text))
    except (ValueError, UsageError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100") from None


def size_gib(text: str) -> float:
    """GiB of at least 0; 0 is a value."""
    try:
        return check_number("", float(text), zero=True)
    except (ValueError, UsageError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of GiB of at least 0") from None


def seconds(text: str) -> float:
    """Seconds of at least 0; 0 is a value."""
    try:
        return check_number("", float(text), zero=True)
    except (ValueError, UsageError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of seconds of at least 0") from None


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return value


def guarded(program: str, body: Callable[[], int]) -> int:
    """Runs a command: what is meant for its user becomes one sentence on stderr, and every end an exit code.

    Args:
        program: what the sentence begins with.
        body: the command; its result is the exit code.
    """
    open_standard_streams()
    try:
        with as_flags():
            return body()
    except FlexMoEError as error:
        complain(f"{program}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        complain(f"{program}: interrupted")
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        complain(f"{program}: {error}")
        return EXIT_IO
    except Exception:  # noqa: BLE001 - the last resort of a program
        traceback.print_exc()
        return EXIT_INTERNAL


def open_standard_streams() -> None:
    """Opens /dev/null where stdin, stdout or stderr is closed, as some daemons start programs: the next file that is opened
    would take its place, and get whatever a library prints."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free is this one
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, _nothing("r" if name == "stdin" else "w"))


def complain(sentence: str) -> None:
    """A line to stderr; where it cannot be written, as to a terminal that is gone, the exit code has to do."""
    try:
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()
    except OSError:
        sys.stderr = _nothing("w")


def _nothing(mode: Literal["r", "w"]) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8")  # it serves until the process ends


def say(*lines: str) -> None:
    """Lines to stdout; a reader that has closed the pipe, or the terminal, or a character that it cannot show, is no reason
    to stop."""
    text, encoding = "".join(f"{line}\n" for line in lines), sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _NO_READER:
            raise
        sys.stdout = _nothing("w")
