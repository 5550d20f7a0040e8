"""Work that is done one after another on a thread of its own, and again a while later where it fails."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from flexmoe.errors import StorageError

log = logging.getLogger(__name__)
#: What failed is tried again after so many seconds: a disk may have room by then.
RETRY_S = 15.0


class BackgroundTasks:
    """One thread and what it has to do.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._stopped = threading.Event()

    def submit(self, work: Callable[[], None]) -> None:
        """Has something done, after what was submitted before; it is done again until it does not fail."""

        def guarded() -> None:
            try:
                work()
            except StorageError as error:
                log.warning("%s; trying again in %.0f s", error, RETRY_S)
                self.later(work)
            except Exception:  # noqa: BLE001 - one batch must not end the work on all others
                log.exception("a batch cannot be worked on; trying again in %.0f s", RETRY_S)
                self.later(work)

        with contextlib.suppress(RuntimeError):  # it is shut down
            self._pool.submit(guarded)

    def later(self, work: Callable[[], None]) -> None:
        """Has something done in a while."""
        timer = threading.Timer(RETRY_S, lambda: None if self._stopped.is_set() else self.submit(work))
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Ends when what has begun is done; the rest is left."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
