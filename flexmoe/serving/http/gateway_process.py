"""The process that clients talk to (`gateway`): started by the engine's, and ended with it, whatever ends that.

It gets what it has to know as one line of JSON: a command line would show the key to other users of the machine.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import uvicorn

from flexmoe.serving.http.counting import Counting, request_counter
from flexmoe.serving.http.gateway import Gateway
from flexmoe.serving.http.guard import Guard
from flexmoe.serving.http.protocol import FAREWELL_S, server_config, timed_protocol
from flexmoe.serving.http.uploads import Uploads
from flexmoe.serving.http.upstream import Upstream
from flexmoe.serving.limits import Limits

#: Where cores are short, clients get a tenth of what the engine gets, and otherwise what it leaves.
_NICER = 10
#: uvicorn's buffer for the headers of a request: a little more than they may have, for the request line and line ends.
_HEADER_ROOM_BYTES = 4 << 10
_STOP = b"stop\n"


class GatewayProcess:
    """The process, as the engine's process has it.

    Args:
        listener: on which clients connect; it is the process's alone from now on.
        limits, api_key: of the server.
        uploads: directory of uploads.
        engine: path of the socket of the engine's process.
    """

    def __init__(
        self, listener: socket.socket, limits: Limits, api_key: str | None, uploads: Path, engine: Path
    ) -> None:
        descriptor = listener.fileno()
        told = {"listener": descriptor, "limits": asdict(limits), "api_key": api_key}
        told |= {"uploads": str(uploads), "engine": str(engine)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flexmoe.serving.http.gateway_process"],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=[descriptor],
            start_new_session=True,  # Ctrl-C is for the engine's process, which then ends this one
        )
        listener.close()
        self._write(json.dumps(told).encode() + b"\n")

    @property
    def process_id(self) -> int:
        """Of the operating system."""
        return self._process.pid

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait()

    def stop(self) -> None:
        """Ends it, once it has answered what it is answering."""
        self._write(_STOP)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(2 * FAREWELL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, data: bytes) -> None:
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            return
        try:
            pipe.write(data)
        except OSError:  # it has ended already
            return


def main() -> None:
    """What the process does."""
    told = json.loads(sys.stdin.buffer.readline())
    os.nice(_NICER)
    limits, engine = Limits(**told["limits"]), Path(told["engine"])
    requests = request_counter()
    gateway = Gateway(Upstream(engine), Uploads(Path(told["uploads"]), limits), requests.registry)
    config = server_config(
        Counting(Guard(gateway, limits, told["api_key"]), requests.counter),
        http=timed_protocol(limits.idle_s),
        h11_max_incomplete_event_size=limits.header_bytes + _HEADER_ROOM_BYTES,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=_end_with_the_engine, args=(server, engine), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=told["listener"])])


def _end_with_the_engine(server: uvicorn.Server, engine: Path) -> None:
    if sys.stdin.buffer.readline() == _STOP:
        server.should_exit = True
        return
    # The engine's process was killed: its next one wants to listen where this one does.
    shutil.rmtree(engine.parent, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    main()
