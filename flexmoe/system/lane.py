"""A lane beside the compute device: a thread that does what it is given in order, or the caller itself."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Lane:
    """One thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, work: Callable[P, T], at_once: bool, /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Let the thread do it, after what it was given before.

        Args:
            at_once: the caller does it instead, now. That is faster where it needs the cores that compute: nobody is woken, and
                two threads want neither these nor the interpreter. It must wait for nothing that is not done.
        """
        if not at_once:
            return self._thread.submit(work, *args, **kwargs)
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # whoever waits for it meets it, as on a thread
            done.set_exception(error)
        return done

    def close(self) -> None:
        """Wait for what is under way, and end the thread."""
        self._thread.shutdown(wait=True)
