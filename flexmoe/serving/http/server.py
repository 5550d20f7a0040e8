"""A whole server: its parts are put together, with the process that clients talk to, and it works until it is told to stop."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from flexmoe.errors import FlexMoEError, UsageError
from flexmoe.serving.endpoints.context import Context
from flexmoe.serving.http.app import make_app
from flexmoe.serving.http.gateway_process import GatewayProcess
from flexmoe.serving.http.protocol import server_config
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
#: Connections that wait until they are accepted.
_BACKLOG = 2048
#: The gateway keeps its connections to the engine's process.
_KEEP_ALIVE_S = 24 * 3600
#: A server that was killed may listen for another moment.
_REBIND_S, _LOOK_S = 3.0, 0.02


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server that clients can connect to.

    Args:
        url: of its page.
        context: its parts.
        server, local: what answers the gateway, and the socket on which it does.
        gateway: the process that clients talk to.
    """

    url: str
    context: Context
    server: uvicorn.Server
    local: socket.socket
    gateway: GatewayProcess

    def run(self) -> None:
        """Serves until it is asked to stop.

        Raises:
            FlexMoEError: the gateway has ended.
        """
        ended: list[int] = []
        threading.Thread(target=lambda: self._watch(ended), name="flexmoe-gateway", daemon=True).start()
        self.server.run(sockets=[self.local])
        if ended:
            raise FlexMoEError(f"the process that answers clients has ended with code {ended[0]}; its errors are above")

    def _watch(self, ended: list[int]) -> None:
        code = self.gateway.wait()
        if not self.server.should_exit:
            ended.append(code)
            self.context.work_queue.stop()
            self.server.should_exit = True


def serve(options: ServerOptions, listening: Callable[[str], None] = lambda url: None) -> None:
    """Serves until a signal asks it to stop.

    Args:
        listening: told the address once clients can connect.

    Raises:
        FlexMoEError: as `parts`; or the address cannot be used; or the process that clients talk to has ended.
    """
    with serving(options) as found:
        listening(found.url)
        found.run()


@contextlib.contextmanager
def serving(options: ServerOptions) -> Iterator[Serving]:
    """A server, until it is left.

    Raises:
        FlexMoEError: as `parts`; or the address cannot be used.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(bound(options)))
        context = stack.enter_context(parts(options))
        # The path of a socket may have 100 characters, which that of the data may exceed.
        path = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexmoe-", ignore_cleanup_errors=True)))
            / "engine"
        )
        local = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
        local.bind(str(path))
        local.listen(_BACKLOG)
        url = address(listener)
        gateway = GatewayProcess(listener, options.limits, options.api_key, context.files.uploads, path)
        stack.callback(gateway.stop)
        yield Serving(url=url, context=context, server=_http_server(context), local=local, gateway=gateway)


def _http_server(context: Context) -> uvicorn.Server:
    """What answers the gateway for the parts of a server; when it is told to stop, they are, too."""
    config = server_config(make_app(context), http="h11", date_header=False, timeout_keep_alive=_KEEP_ALIVE_S)
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
    end_s = time.monotonic() + _REBIND_S
    while True:
        try:
            return _bound(options)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < end_s:
                time.sleep(_LOOK_S)
                continue
            raise UsageError(
                f"{options.host}:{options.port} cannot be used: {error.strerror or error}; choose another {option('port')}"
            ) from error


def _bound(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host.strip("[]"), options.port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
