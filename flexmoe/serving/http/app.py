"""The application of the engine's process: all endpoints, and the errors of all of them in one form. The process that clients talk
to has checked what it gets (`gateway`)."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from flexmoe.errors import FlexMoEError, StorageError
from flexmoe.job.identity import versions
from flexmoe.serving.endpoints import batches, completions, files, models, page, stats
from flexmoe.serving.endpoints.context import Context
from flexmoe.serving.errors import ApiError

log = logging.getLogger(__name__)
_MESSAGES = {404: "there is no such endpoint", 405: "this endpoint does not take that method"}


def make_app(context: Context) -> FastAPI:
    """The application of a server."""
    app = FastAPI(
        title="FlexMoE",
        version=versions()["flexmoe"] or "unknown",
        description="Files, batches and completions, as OpenAI's API has them.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    app.state.metrics = stats.Metrics(context)
    app.state.performance = stats.PerformanceReport(context)
    for part in (files, batches, completions, models, stats, page):
        app.include_router(part.router())
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(FlexMoEError, _user_error)
    app.add_exception_handler(Exception, _fault)
    return app


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())


def _api_error(_: Request, error: Exception) -> Response:
    return _response(error) if isinstance(error, ApiError) else _fault(_, error)


def _wrong_parameter(_: Request, error: Exception) -> Response:
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    first = faults[0] if faults else {"loc": ("",), "msg": "a parameter is wrong"}
    param = str(first["loc"][-1])
    return _response(ApiError(400, f"{param}: {first['msg']}", code="invalid_value", param=param))


def _http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    response = _response(ApiError(status, _MESSAGES.get(status, "the request cannot be served"), code="http_error"))
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    return response


def _user_error(_: Request, error: Exception) -> Response:
    if isinstance(error, StorageError):
        log.error("%s", error)
        return _response(ApiError(507, "the disk is full, or failed; look at the server's log", code="storage"))
    return _response(ApiError(400, str(error), code="invalid_request"))


def _fault(_: Request, error: Exception) -> Response:
    log.error("a request has failed", exc_info=error)
    return _response(ApiError(500, "the server has met a fault of its own; its log says which", code="internal"))
