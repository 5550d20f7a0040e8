"""What clients talk to: it receives uploads, answers what many ask at once, and hands the rest to the engine's process.

Python runs one thread of a process at a time. In the engine's own process many clients would stop the engine at every turn; so
what is much work for a server, and none for an engine, is done in another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, generate_latest
from starlette.types import Message, Receive, Scope, Send

from flexmoe.errors import StorageError
from flexmoe.serving.errors import ApiError
from flexmoe.serving.http.guard import UPLOAD_PATH, answer
from flexmoe.serving.http.uploads import Uploads
from flexmoe.serving.http.upstream import Answer, Upstream

log = logging.getLogger(__name__)
#: A read is answered again for so long, unless anything is written meanwhile.
_FRESH_S = 0.25
_FAULT = ApiError(500, "the server has met a fault of its own; its log says which", code="internal")
_STOPPED = ApiError(503, "the server is starting or stopping; ask again", code="stopping", retry_after_s=2)
_FULL = ApiError(507, "the disk is full, or failed; look at the server's log", code="storage")


class Gateway:
    """An ASGI application.

    Args:
        upstream: the engine's process.
        uploads: receives files.
        registry: of the counters of this process, which `/metrics` shows beside those of the engine's.
    """

    def __init__(self, upstream: Upstream, uploads: Uploads, registry: CollectorRegistry) -> None:
        self._upstream, self._uploads, self._registry = upstream, uploads, registry
        self._reads: dict[tuple[bytes, bytes], asyncio.Task[Answer]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._serve(scope, receive, noted)
        except Exception as error:  # noqa: BLE001 - whatever it is, others are served
            if started:  # nothing but the end of the connection tells that the answer is not whole
                raise
            await answer(_told(error), send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method == "POST" and path == UPLOAD_PATH:
            response = await self._uploads.receive(Request(scope, receive), self._keep)
            await response(scope, receive, send)
        elif method == "GET" and not path.endswith("/content"):
            await (await self._read(scope)).send(send)
        else:
            await self._relay(scope, await _body(receive), receive, send)

    async def _keep(self, name: str, filename: str, fields: Mapping[str, str]) -> Response:
        told = {"name": name, "filename": filename, "fields": dict(fields)}
        kept = await self._upstream.post(UPLOAD_PATH, told)
        self._reads.clear()
        return Response(kept.body, kept.status, {name.decode(): value.decode() for name, value in kept.headers})

    async def _read(self, scope: Scope) -> Answer:
        """Asks once for all who ask the same within a moment."""
        target = scope["raw_path"], scope["query_string"]
        task = self._reads.get(target)
        if task is None:
            task = self._reads[target] = asyncio.ensure_future(self._asked(scope))
            asyncio.get_running_loop().call_later(_FRESH_S, self._forget, target, task)
        return await asyncio.shield(task)

    def _forget(self, target: tuple[bytes, bytes], task: asyncio.Task[Answer]) -> None:
        if self._reads.get(target) is task:
            del self._reads[target]

    async def _asked(self, scope: Scope) -> Answer:
        found = await self._upstream.read(scope)
        if scope["path"] == "/metrics" and found.status == 200:
            return Answer(found.status, found.headers, found.body + generate_latest(self._registry))
        return found

    async def _relay(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Hands on a request and its answer, as long as the client is there."""
        if scope["method"] != "GET":
            self._reads.clear()
        work = asyncio.ensure_future(self._upstream.relay(scope, body, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            if scope["method"] != "GET":
                self._reads.clear()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _body(receive: Receive) -> bytes:
    """The whole body, which the guard has limited.

    Raises:
        ApiError: it was cut off.
    """
    pieces, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the body was cut off", code="incomplete_body")
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    message: Mapping[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


def _told(error: Exception) -> ApiError:
    """What a client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StorageError):
        log.error("%s", error)
        return _FULL
    if isinstance(error, httpx.HTTPError):
        return _STOPPED
    log.error("a request has failed", exc_info=error)
    return _FAULT
