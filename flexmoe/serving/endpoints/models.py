"""`/v1/models`: which models are served, and which one is loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from flexmoe.serving.endpoints.bodies import described, read_object
from flexmoe.serving.endpoints.context import Context, Served, context_of
from flexmoe.serving.errors import invalid, not_found
from flexmoe.serving.work.models import Served as ServedModel

_SCHEMA = described({"additionalProperties": False, "required": ["model"], "properties": {"model": {"type": "string"}}})


async def page(context: Served) -> JSONResponse:
    """All models."""
    return JSONResponse({"object": "list", "data": [_model_object(context, each) for each in context.models]})


async def get(context: Served, model: str) -> JSONResponse:
    """One model."""
    served = context.models.get(model)
    if served is None:
        raise not_found("model", model, "model")
    return JSONResponse(_model_object(context, served))


async def switch(request: Request) -> JSONResponse:
    """Has a model loaded, when the rows in flight of another one have ended."""
    context, body = context_of(request), await read_object(request)
    name = body.get("model")
    if body.keys() != {"model"} or not isinstance(name, str):
        raise invalid("model", "give the id of a model, and nothing else", "missing_required_parameter")
    served = context.models.get(name)
    if served is None:
        raise not_found("model", name, "model")
    context.work_queue.switch(served.id)
    return JSONResponse(_model_object(context, served), 202)


def _model_object(context: Context, served: ServedModel) -> dict[str, Any]:
    """A model as clients know it; ``state`` is ours."""
    state = context.engine.state if context.engine.loaded == served.id else "not loaded"
    return {
        "id": served.id,
        "object": "model",
        "created": served.created_s,
        "owned_by": "flexmoe",
        "state": "loaded" if state in ("idle", "running") else state,
        "context_tokens": served.context,
    }


def router() -> APIRouter:
    """The endpoints."""
    made = APIRouter(prefix="/v1/models", tags=["models"])
    made.add_api_route("", page, methods=["GET"])
    made.add_api_route("/switch", switch, methods=["POST"], openapi_extra=_SCHEMA, status_code=202)
    made.add_api_route("/{model:path}", get, methods=["GET"])
    return made
