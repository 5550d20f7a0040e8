"""Stands before all endpoints: who may ask, from where, how much, and how slowly.

A page of another site that a browser shows can send requests to a server on loopback, and by a name that it has pointed there
it can read the answers. So a server without a key answers only to the names of its own machine, and changes come from its own
page or from programs, which send no ``Origin``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexmoe.serving.errors import ApiError, too_large
from flexmoe.serving.limits import Limits, is_loopback

UPLOAD_PATH = "/v1/files"
#: What everybody may ask: whether the server lives, and the page, in which nothing of anybody is.
OPEN_PATHS = frozenset({"/health", "/ready", "/", "/page.css", "/page.js", "/engine.js"})
_READING = ("GET", "HEAD", "OPTIONS")
#: The parts of a form around a file.
_FORM_BYTES = 64 << 10
#: A body that comes more slowly holds a place that others wait for.
_LEAST_BYTES_PER_S = 4096
#: A refused body of at most so many bytes is read, for so many seconds, so that the client reads the answer.
_DRAINED_BYTES, _DRAINED_S = 64 << 20, 5.0
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Guard:
    """An ASGI application around another one.

    Args:
        app: what answers.
        limits: of the server.
        api_key: that clients have to give; None: they need none.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None) -> None:
        self._app, self._limits, self._api_key = app, limits, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limits.idle_s, has_body=_has_body(_headers(scope)))

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = _with_ours(message["headers"], close=not body.is_read)
            await send(message)

        try:
            body.most_bytes = self._checked(scope)
        except ApiError as error:
            await body.drain(_number(_headers(scope).get("content-length")))
            await answer(error, guarded)
            return
        await self._app(scope, body.receive, guarded)

    def _checked(self, scope: Scope) -> int:
        """Most bytes of the body.

        Raises:
            ApiError: the request is refused.
        """
        headers, path, limits = _headers(scope), scope["path"], self._limits
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limits.header_bytes:
            raise ApiError(431, f"the headers are longer than {limits.header_bytes} bytes", code="headers_too_large")
        self._check_place(scope["method"], headers)
        if path not in OPEN_PATHS:
            self._check_key(headers)
        uploads = path == UPLOAD_PATH
        most = limits.upload_bytes + _FORM_BYTES if uploads else limits.body_bytes
        announced = _number(headers.get("content-length"))
        if announced is not None and announced > most:
            raise too_large(limits.upload_bytes if uploads else most)
        return most

    def _check_place(self, method: str, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        name = _split(f"//{host}").hostname or ""
        if self._api_key is None and not is_loopback(name):
            raise ApiError(421, f"this server is not {host[:80]!r}; ask for localhost", code="wrong_host")
        origin = headers.get("origin")
        if method in _READING or (origin is None and headers.get("sec-fetch-site") in (None, "same-origin", "none")):
            return
        if origin is None or _split(origin).netloc != host:
            raise ApiError(403, "pages of other sites may change nothing here", code="cross_origin")

    def _check_key(self, headers: Mapping[str, str]) -> None:
        key = self._api_key
        if key is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            what = "is wrong" if given else "is missing; give it as `Authorization: Bearer KEY`"
            raise ApiError(401, f"the API key {what}", code="invalid_api_key")


class _Body:
    """The body of a request, watched while it comes in.

    Attributes:
        is_read: whether nothing of it is left in the connection.
    """

    def __init__(self, receive: Receive, idle_s: float, *, has_body: bool) -> None:
        self._receive, self._idle_s = receive, idle_s
        self.most_bytes, self._size_bytes, self.is_read = 0, 0, not has_body
        self._waited_s = 0.0

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            ApiError: it is too slow, or the body too long.
        """
        if self.is_read:
            return await self._receive()
        began_s = time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), self._idle_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"nothing has come for {self._idle_s:.0f} s", code="request_timeout") from None
        self._waited_s += time.monotonic() - began_s
        self._note(message)
        if not self.is_read and self._waited_s > self._idle_s + self._size_bytes / _LEAST_BYTES_PER_S:
            raise ApiError(
                408, f"the body comes at less than {_LEAST_BYTES_PER_S} bytes a second", code="request_timeout"
            )
        if self._size_bytes > self.most_bytes:
            raise too_large(self.most_bytes)
        return message

    async def drain(self, announced: int | None) -> None:
        """Reads what is left of a body that nobody wants, where that is little."""
        if announced is not None and announced > _DRAINED_BYTES:
            return
        try:
            await asyncio.wait_for(self._drain(), _DRAINED_S)
        except asyncio.TimeoutError:
            return

    async def _drain(self) -> None:
        while not self.is_read and self._size_bytes < _DRAINED_BYTES:
            self._note(await self._receive())

    def _note(self, message: Message) -> None:
        self._size_bytes += len(message.get("body", b""))
        self.is_read = message["type"] != "http.request" or not message.get("more_body", False)


async def answer(error: ApiError, send: Send) -> None:
    """Sends an error."""
    data = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(data)), **error.headers()}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": data})


def _split(url: str) -> SplitResult:
    """The parts of an address; no parts of what is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _with_ours(headers: list[tuple[bytes, bytes]], *, close: bool) -> list[tuple[bytes, bytes]]:
    """With the headers that every answer has, where it has no other value of its own."""
    names = {name.lower() for name, _ in headers}
    more = _HEADERS | ({"connection": "close"} if close else {})
    ours = [(name.encode(), value.encode()) for name, value in more.items()]
    return [*headers, *((name, value) for name, value in ours if name not in names)]


def _has_body(headers: Mapping[str, str]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
