"""A whole server: its parts are put together, and it listens until it is told to stop."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from flexmoe.errors import UsageError
from flexmoe.serving.endpoints.context import Context
from flexmoe.serving.http.app import make_app
from flexmoe.serving.http.priority import put_behind_engine
from flexmoe.serving.http.protocol import timed_protocol
from flexmoe.serving.settings import ServerOptions
from flexmoe.serving.store.batches import BatchStore
from flexmoe.serving.store.database import Database
from flexmoe.serving.store.files import FileStore
from flexmoe.serving.work.completion_codec import CompletionCodec
from flexmoe.serving.work.engine_thread import EngineThread
from flexmoe.serving.work.lifecycle import Lifecycle
from flexmoe.serving.work.models import ServedModels
from flexmoe.serving.work.stats import EngineStats
from flexmoe.serving.work.work_queue import WorkQueue
from flexmoe.system.lock import Lock
from policies.common.file_io import storage_errors
from policies.common.option_names import option

log = logging.getLogger(__name__)
#: What is still being answered gets so many seconds when the server stops.
_FAREWELL_S = 5
#: Connections that wait until they are accepted.
_BACKLOG = 2048
#: uvicorn's buffer for the headers of a request: a little more than they may have, for the request line and line ends.
_HEADER_ROOM_BYTES = 4 << 10


@contextlib.contextmanager
def parts(options: ServerOptions) -> Iterator[Context]:
    """The parts of a server, at work as long as they are entered.

    Raises:
        FlexMoEError: a model cannot be run, or the data directory cannot be used, or another server uses it.
    """
    with contextlib.ExitStack() as stack:
        with storage_errors(options.data_dir):
            options.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = Lock(options.data_dir / "lock")
        stack.callback(lock.release)
        models = ServedModels(options)
        codec = CompletionCodec(models)
        database = Database(options.data_dir / "server.sqlite")
        stack.callback(database.close)
        files, batches = FileStore(database, options.data_dir), BatchStore(database)
        work_queue, stats = WorkQueue(options.limits.concurrent_requests), EngineStats()
        lifecycle = Lifecycle(options.data_dir, batches, files, models, work_queue, options.limits)
        stack.callback(lifecycle.close)
        engine = EngineThread(options, models, work_queue, lifecycle, stats)
        lifecycle.recover()
        engine.start()
        stack.callback(engine.join)
        stack.callback(work_queue.stop)
        yield Context(
            options=options,
            models=models,
            files=files,
            batches=batches,
            work_queue=work_queue,
            lifecycle=lifecycle,
            engine=engine,
            stats=stats,
            codec=codec,
        )


class _Server(uvicorn.Server):
    """Tells the engine of a signal at once: answers that are being generated would hold up the end."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks the server to stop."""
        threading.Thread(target=self._on_exit, daemon=True).start()  # a handler must not wait for a lock
        super().handle_exit(sig, frame)


def serve(options: ServerOptions, listening: Callable[[str], None] = lambda url: None) -> None:
    """Serves until a signal asks it to stop.

    Args:
        listening: told the address once clients can connect.

    Raises:
        FlexMoEError: as `parts`; or the address cannot be used.
    """
    with contextlib.closing(bound(options)) as listener, parts(options) as context:
        put_behind_engine()
        listening(address(listener))
        http_server(context).run(sockets=[listener])


def http_server(context: Context) -> uvicorn.Server:
    """What speaks HTTP for the parts of a server; when it is told to stop, they are, too."""
    limits = context.options.limits
    config = uvicorn.Config(
        make_app(context),
        http=timed_protocol(limits.idle_s),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header_bytes + _HEADER_ROOM_BYTES,
        timeout_graceful_shutdown=_FAREWELL_S,
    )
    return _Server(config, context.work_queue.stop)


def address(listener: socket.socket) -> str:
    """The URL of a listener's page."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def bound(options: ServerOptions) -> socket.socket:
    """The socket that the server listens on; connections wait there until it answers.

    Raises:
        UsageError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host.strip("[]"), options.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{options.host}:{options.port} cannot be used: {error.strerror or error}; choose another {option('port')}"
        ) from error
    return listener
