"""`/v1/chat/completions` and `/v1/completions`, whole or in pieces as they are generated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from flexmoe.openai.batch_line import ALIASES, ROLES
from flexmoe.openai.fields import FLAGS, INTEGERS, LIMITS, NUMBERS
from flexmoe.serving.endpoints.bodies import described, read_object
from flexmoe.serving.endpoints.chunks import ChunkStream
from flexmoe.serving.endpoints.context import Context, context_of
from flexmoe.serving.errors import ApiError, busy
from flexmoe.serving.work.completion_codec import CompletionRequest
from flexmoe.serving.work.online_requests import OnlineRequest

#: Without anything to say, so often a client and what lies between hear that the answer is still coming; and so often it is
#: looked whether the client is there.
_ALIVE_S, _LOOK_S = 15.0, 1.0
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
#: What the description says of the other fields; `flexmoe.openai.fields` reads them.
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(NUMBERS, {"type": "number"}),
    **dict.fromkeys((*INTEGERS, *LIMITS), {"type": "integer"}),
    **dict.fromkeys((*FLAGS, "stream"), {"type": "boolean"}),
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
}
_MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"type": "string", "enum": [*ROLES, *ALIASES]}, "content": {"type": "string"}},
}
_PROMPTS: dict[str, Any] = {
    "/v1/chat/completions": {"messages": {"type": "array", "minItems": 1, "items": _MESSAGE}},
    "/v1/completions": {"prompt": {"anyOf": [{"type": "string"}, {"type": "array"}]}},
}


def _endpoint(url: str) -> Callable[[Request], Awaitable[Response]]:
    async def complete(request: Request) -> Response:
        """Completes a prompt."""
        context, body = context_of(request), await read_object(request)
        completion = await run_in_threadpool(context.codec.read, body, url, context.lifecycle.now())
        waiter = _Waiter(context, completion)
        if not completion.streams:
            return await _whole(context, completion, waiter, request)
        pieces = _pieces(context, completion, waiter)
        return StreamingResponse(pieces, media_type="text/event-stream", headers=_STREAM_HEADERS)

    return complete


class _Waiter:
    """Waits for what comes of an online request.

    Raises:
        ApiError: too many wait already.
    """

    def __init__(self, context: Context, completion: CompletionRequest) -> None:
        self._context, self._changed = context, asyncio.Event()
        loop = asyncio.get_running_loop()

        def changed() -> None:
            try:
                loop.call_soon_threadsafe(self._changed.set)
            except RuntimeError:  # the server has stopped
                return

        self.online = OnlineRequest(
            completion.served.id,
            completion.parts,
            arrival=context.work_queue.next_arrival(),
            streams=completion.streams,
            on_change=changed,
        )
        if not context.work_queue.submit(self.online):
            raise busy(f"{context.options.limits.concurrent_requests} completions wait already")

    async def wait(self, seconds: float) -> bool:
        """Waits until something is new; False where nothing was for so long."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        self._changed.clear()
        return True

    def check(self) -> None:
        """Shows that the online request has not failed.

        Raises:
            ApiError: it has.
        """
        failure = self.online.failure
        if failure is not None:
            retry_after_s = 5 if failure.status == 503 else None
            raise ApiError(failure.status, failure.message, code=failure.code, retry_after_s=retry_after_s)

    def drop(self) -> None:
        """Nobody waits any longer."""
        if not self.online.is_done:
            self._context.work_queue.drop(self.online)


async def _whole(context: Context, completion: CompletionRequest, waiter: _Waiter, request: Request) -> Response:
    try:
        while not waiter.online.is_done:
            if not await waiter.wait(_LOOK_S) and await request.is_disconnected():
                return Response(status_code=499)
        waiter.check()
    finally:
        waiter.drop()
    return JSONResponse(await run_in_threadpool(context.codec.body, completion, waiter.online.results()))


async def _pieces(context: Context, completion: CompletionRequest, waiter: _Waiter) -> AsyncIterator[bytes]:
    chunks = ChunkStream(context.codec, completion)
    silent_s = 0.0
    try:
        for chunk in chunks.beginning():
            yield _event(chunk)
        while True:
            done = waiter.online.is_done  # before what is new is read, so that nothing is missed
            waiter.check()
            for chunk in await run_in_threadpool(chunks.new, waiter.online):
                yield _event(chunk)
                silent_s = 0.0
            if done:
                break
            silent_s = 0.0 if await waiter.wait(_LOOK_S) else silent_s + _LOOK_S
            if silent_s >= _ALIVE_S:
                yield b": waiting\n\n"
                silent_s = 0.0
        for chunk in await run_in_threadpool(chunks.end, waiter.online.results()):
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except ApiError as error:  # the status is sent already
        yield _event(error.body())
    finally:
        waiter.drop()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


def _schema(url: str) -> dict[str, Any]:
    properties = {"model": {"type": "string"}, **_PROMPTS[url], **_FIELDS}
    return described({"required": ["model", *_PROMPTS[url]], "properties": properties})


def router() -> APIRouter:
    """The endpoints."""
    made = APIRouter(tags=["completions"])
    for url in _PROMPTS:
        name = url.removeprefix("/v1/").replace("/", "_")
        made.add_api_route(
            url, _endpoint(url), methods=["POST"], name=name, response_class=JSONResponse, openapi_extra=_schema(url)
        )
    return made
