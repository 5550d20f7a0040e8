"""What all command lines share: flags that are checked while they are parsed, and one map from errors to exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable

from policies.errors import FlexMoEError, UsageError
from policies.placement import check_number, check_percent

EXIT_INTERNAL, EXIT_IO, EXIT_INTERRUPTED = 1, 74, 130
_DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that one place maps errors to exit codes."""

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")


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
    try:
        return body()
    except FlexMoEError as error:
        sys.stderr.write(f"{program}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: interrupted\n")
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        sys.stderr.write(f"{program}: {error}\n")
        return EXIT_IO
    except Exception:  # noqa: BLE001 - the last resort of a program
        traceback.print_exc()
        return EXIT_INTERNAL


def say(*lines: str) -> None:
    """Lines to stdout; a reader that has closed the pipe, or a character that it cannot show, is no reason to stop."""
    text, encoding = "".join(f"{line}\n" for line in lines), sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it serves until the process ends
