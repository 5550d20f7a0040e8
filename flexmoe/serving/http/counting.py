"""Counts answers by method, route and status."""

from __future__ import annotations

import re
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = re.compile(r"/(file-|batch_)[^/]*")
_ROUTES = re.compile(
    r"/|/page\.(css|js)|/engine\.js|/health|/ready|/metrics|/openapi\.json|/v1/(files|batches|models)(/.*)?|/v1/(chat/)?completions|/v1/stats/\w+"
)
_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class RequestCounter:
    """A counter in a registry of its own."""

    registry: CollectorRegistry
    counter: Counter


def request_counter() -> RequestCounter:
    """What counts answers by method, route and status."""
    registry = CollectorRegistry(auto_describe=False)
    names = ("method", "route", "status")
    return RequestCounter(
        registry, Counter("flexmoe_http_requests", "answers that were sent", names, registry=registry)
    )


class Counting:
    """An ASGI application around another one.

    Args:
        app: that answers.
        requests: the counter.
    """

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if scope["type"] == "http":
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._requests.labels(method, _route(scope["path"]), str(status)).inc()


def _route(path: str) -> str:
    """The route of a path: clients must not make as many labels as they like."""
    if not _ROUTES.fullmatch(path):
        return "other"
    path = _ID.sub("/ID", path)
    parts = path.split("/")
    if path.startswith("/v1/models/") and path != "/v1/models/switch":
        return "/v1/models/ID"
    known = len(parts) <= 3 or parts[3] == "ID" or not path.startswith(("/v1/files", "/v1/batches"))
    return path if known and len(parts) <= 5 else "other"
