"""HTTP/1.1 as uvicorn speaks it, with a time limit for the headers of a request and an error's own status for bad ones."""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flexmoe.serving.errors import ApiError


class TimedProtocol(H11Protocol):
    """One connection; `timed_protocol` makes the class.

    Attributes:
        header_s: seconds that the headers of a request may take.
    """

    header_s = 30.0
    _timer: asyncio.TimerHandle | None = None

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
        super().connection_lost(exc)

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
            self._timer = self.loop.call_later(self.header_s, self._late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:
            self._refuse(ApiError(408, f"no request has come in {self.header_s:.0f} s", code="request_timeout"))
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


def timed_protocol(header_s: float) -> type[TimedProtocol]:
    """The class for connections whose headers may take so many seconds."""
    return type("Protocol", (TimedProtocol,), {"header_s": header_s})
