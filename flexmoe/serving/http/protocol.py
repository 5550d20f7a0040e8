"""HTTP/1.1 as uvicorn speaks it, with time limits for the headers of a request and for clients that do not read their answer, and
an error's own status for bad requests."""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flexmoe.serving.errors import ApiError

#: What is still being answered gets so many seconds when the server stops.
FAREWELL_S = 5


class TimedProtocol(H11Protocol):
    """One connection; `timed_protocol` makes the class.

    Attributes:
        idle_s: seconds that the headers of a request may take, and in which a client has to read some of an answer.
    """

    idle_s = 30.0
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._unwatch()
        self._unwatch_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """It has read enough to be sent more."""
        self._unwatch_reading()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What has come is no request: the status is that of the fault, as for headers that are too long."""
        fault = sys.exc_info()[1]
        status = getattr(fault, "error_status_hint", 400)
        self._refuse(ApiError(status, msg, code="invalid_http"))

    def _watch(self) -> None:
        """Headers that have begun, or are to begin, have to end in time."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.idle_s, self._late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.idle_s, self._check_reading, unread)

    def _unwatch_reading(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _check_reading(self, unread: int) -> None:
        """A client that has read nothing is hung up on: its answer would be kept for ever."""
        if self.transport.get_write_buffer_size() < unread:
            self._watch_reading()
        else:
            self.transport.abort()

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:
            self._refuse(ApiError(408, f"no request has come in {self.idle_s:.0f} s", code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        data = json.dumps(error.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(data))), ("connection", "close")]
        try:
            reason = HTTPStatus(error.status).phrase
        except ValueError:
            reason = ""
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
            h11.Data(data=data),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def timed_protocol(idle_s: float) -> type[TimedProtocol]:
    """The class for connections whose clients may let so many seconds pass."""
    return type("Protocol", (TimedProtocol,), {"idle_s": idle_s})


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """How uvicorn serves an application here: requests alone, and without a word of its own.

    Args:
        app: ASGI.
        **options: further ones of `uvicorn.Config`.
    """
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=FAREWELL_S,
        **options,
    )
