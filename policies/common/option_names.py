"""What messages call an option: a Python argument, or a flag where a command line runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: Flags that are not the argument's name.
_FLAGS = {"checkpoint_interval_s": "--checkpoint-interval", "directory": "--dir"}


class _Style:
    """Of this process: threads and what they raise belong to the program that started them."""

    flags = False


def option(name: str, value: object = None) -> str:
    """An option, as whoever called can give it: ``gpu_mem`` or ``--gpu-mem``.

    Args:
        name: of the Python argument.
        value: that it should have: ``overwrite=True`` or ``--overwrite``, ``dtype='float16'`` or ``--dtype float16``.
    """
    if not _Style.flags:
        return name if value is None else f"{name}={value!r}"
    flag = _FLAGS.get(name) or "--" + name.replace("_", "-")
    return flag if value is None or value is True else f"{flag} {value}"


def are_flags() -> bool:
    """Whether options are called by their flags."""
    return _Style.flags


def use_flags(flags: bool) -> None:
    """From now on options are called by their flags, or by their arguments."""
    _Style.flags = flags


@contextmanager
def as_flags() -> Iterator[None]:
    """Options are called by their flags meanwhile."""
    before = are_flags()
    use_flags(True)
    try:
        yield
    finally:
        use_flags(before)
