"""Work that is done by whoever asks for its result."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Deferred(Future[T]):
    """A future without a thread: the first call of `result`, or of `do`, does the work.

    On device cpu it takes the place of a lane's thread, which would want the cores that compute, and the interpreter: work is done
    faster where nobody is woken for it. One thread alone may ask for it.

    Args:
        work: what is done; its error is raised by `result`.
    """

    def __init__(self, work: Callable[..., T], *args: Any):
        super().__init__()
        self._work: tuple[Callable[..., T], tuple[Any, ...]] | None = (work, args)

    def do(self) -> Deferred[T]:
        """Do the work now, unless it has been done."""
        if self._work is not None:
            (work, args), self._work = self._work, None
            try:
                self.set_result(work(*args))
            except BaseException as error:  # whoever waits for it meets it, as one from a thread
                self.set_exception(error)
                if not isinstance(error, Exception):  # an interrupt is the caller's, too
                    raise
        return self

    def result(self, timeout: float | None = None) -> T:
        """What the work gives; see the class."""
        return super(Deferred, self.do()).result(timeout)
