"""The engine's process, as the process knows it that clients talk to: the same requests, over a socket of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Scope, Send

from flexmoe.serving.errors import ApiError

Headers = list[tuple[bytes, bytes]]
#: Of one connection, and not of what is sent over it.
_OF_A_CONNECTION = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"expect", b"content-length"}
)
_KEPT_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes

    async def send(self, send: Send) -> None:
        """Gives it to a client."""
        headers = [*self.headers, (b"content-length", str(len(self.body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class Upstream:
    """Asks the engine's process.

    Args:
        path: of its socket.
    """

    def __init__(self, path: Path) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_KEPT_CONNECTIONS)
        transport = httpx.AsyncHTTPTransport(uds=str(path), limits=limits)
        self._client = httpx.AsyncClient(transport=transport, timeout=None, trust_env=False)

    async def read(self, scope: Scope) -> Answer:
        """What a request without a body is answered, as a whole.

        Raises:
            httpx.HTTPError: it is not answered.
        """
        async with self._sent(scope, b"") as response:
            return Answer(response.status_code, _passed_on(response.headers.raw), await response.aread())

    async def post(self, path: str, value: Any) -> Answer:
        """What is answered to JSON.

        Raises:
            httpx.HTTPError: it is not answered.
        """
        response = await self._client.post(f"http://localhost{path}", json=value)
        return Answer(response.status_code, _passed_on(response.headers.raw), response.content)

    async def relay(self, scope: Scope, body: bytes, send: Send) -> None:
        """Gives a client what its request is answered, piece by piece.

        Raises:
            httpx.HTTPError: it is not answered, or not to the end.
        """
        async with self._sent(scope, body) as response:
            headers = _passed_on(response.headers.raw)
            headers += [(name, value) for name, value in response.headers.raw if name.lower() == b"content-length"]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    @contextlib.asynccontextmanager
    async def _sent(self, scope: Scope, body: bytes) -> AsyncIterator[httpx.Response]:
        headers = _passed_on(scope["headers"])
        request = self._client.build_request(scope["method"], _url(scope), headers=headers, content=body or None)
        response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()


def _url(scope: Scope) -> httpx.URL:
    """The address of a request.

    Raises:
        ApiError: it is another one for the engine's process than for this one, which has checked it.
    """
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    try:
        url = httpx.URL(scheme="http", host="localhost", raw_path=target)
    except httpx.InvalidURL:
        raise ApiError(400, "the address of the request is none", code="invalid_http") from None
    if url.raw_path.partition(b"?")[0] != scope["raw_path"]:
        raise ApiError(404, "there is no such endpoint", code="http_error")
    return url


def _passed_on(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in _OF_A_CONNECTION]
