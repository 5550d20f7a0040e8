"""`/v1/batches`: create, get, cancel, list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from flexmoe.openai.batch_line import URLS
from flexmoe.serving.endpoints.bodies import described, read_object
from flexmoe.serving.endpoints.context import Context, Served, context_of
from flexmoe.serving.endpoints.files import expiry_s, listed
from flexmoe.serving.errors import ApiError, busy, invalid, not_found
from flexmoe.serving.store.batches import BatchRecord
from policies.common.reading import whole

_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_WINDOW_S = 30 * 86400
_MOST_KEYS, _KEY_CHARACTERS, _VALUE_CHARACTERS = 16, 64, 512
_MOST_PRIORITY, _MOST_LISTED = 1000, 100
_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after", "priority")
_SCHEMA = described(
    {
        "additionalProperties": False,
        "required": ["input_file_id", "endpoint", "completion_window"],
        "properties": {
            "input_file_id": {"type": "string"},
            "endpoint": {"type": "string", "enum": list(URLS)},
            "completion_window": {"type": "string", "pattern": f"^{_WINDOW.pattern}$"},
            "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
            "output_expires_after": {"type": "object"},
            "priority": {"type": "integer", "minimum": -_MOST_PRIORITY, "maximum": _MOST_PRIORITY},
        },
    }
)


async def create(request: Request) -> dict[str, Any]:
    """Makes a batch of a file."""
    body = await read_object(request)
    return await run_in_threadpool(_create, context_of(request), body)


def _create(context: Context, body: Mapping[str, Any]) -> dict[str, Any]:
    unknown = next((name for name in body if name not in _FIELDS), None)
    if unknown is not None:
        raise invalid(unknown[:80], f"the field {unknown[:80]!r} is not known; remove it", "unknown_parameter")
    file_id, endpoint = _text(body, "input_file_id"), _text(body, "endpoint")
    if endpoint not in URLS:
        raise invalid("endpoint", f"endpoint is {endpoint[:80]!r}; give {' or '.join(URLS)}")
    file = context.files.get(file_id)
    if file is None:
        raise not_found("file", file_id, "input_file_id")
    if file.purpose != "batch":
        raise invalid("input_file_id", f"the file is for {file.purpose}; upload it with the purpose batch")
    keep = body.get("output_expires_after")
    now, limits = context.lifecycle.now(), context.options.limits
    window = _text(body, "completion_window")
    record = context.batches.create(
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=window,
        metadata=_metadata(body.get("metadata")),
        files_expire_s=None if keep is None else expiry_s(keep, "output_expires_after"),
        priority=_priority(body.get("priority", 0)),
        now_s=now,
        expires_at=now + _window_s(window),
        most_open=limits.open_batches,
    )
    if record is None:
        raise busy(f"{limits.open_batches} batches are open; wait for one to end, or cancel one", 30)
    context.lifecycle.prepare(record)
    context.lifecycle.validate(record)
    return batch_object(context, record)


async def get(context: Served, batch_id: str) -> JSONResponse:
    """One batch."""
    return JSONResponse(batch_object(context, _record(context, batch_id, "batch_id")))


async def page(
    context: Served, after: str | None = None, limit: int = Query(default=20, ge=1, le=_MOST_LISTED)
) -> JSONResponse:
    """Batches, the newest first."""
    last = None if after is None else _record(context, after, "after")
    records, more = context.batches.page(limit, last)
    return JSONResponse(listed([batch_object(context, record) for record in records], more=more))


def cancel(context: Served, batch_id: str) -> dict[str, Any]:
    """Has a batch end with what it has done. Once more changes nothing."""
    record = _record(context, batch_id, "batch_id")
    changed = context.lifecycle.cancel(record) or _record(context, batch_id, "batch_id")
    if changed.status not in ("cancelling", "cancelled"):
        raise ApiError(409, f"the batch is {changed.status} and cannot be cancelled any longer", code="batch_ended")
    return batch_object(context, changed)


def batch_object(context: Context, record: BatchRecord) -> dict[str, Any]:
    """A batch as clients know it, with how far it is now."""
    run = None if record.has_ended else context.work_queue.run(record.id)
    total, ok, failed = record.total, record.completed, record.failed
    prompt, generated = record.prompt_tokens, record.generated_tokens
    if run is not None:
        done = run.progress
        total, ok, failed = done.rows, done.ok, done.failed
        prompt, generated = done.prompt_tokens, done.generated_tokens
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": None if record.errors is None else {"object": "list", "data": list(record.errors)},
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": record.status,
        "output_file_id": record.output_file_id if ok else None,
        "error_file_id": record.error_file_id if failed else None,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        **{f"{name}_at": getattr(record, f"{name}_at") for name in times},
        "request_counts": {"total": total, "completed": ok, "failed": failed},
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + generated,
        },
        "metadata": record.metadata,
        "model": record.model,
        "priority": record.priority,
    }


def _record(context: Context, batch_id: str, param: str) -> BatchRecord:
    record = context.batches.get(batch_id)
    if record is None:
        raise not_found("batch", batch_id, param)
    return record


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise invalid(name, f"{name} is missing; give it as text", "missing_required_parameter")
    return value


def _window_s(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not 0 < seconds <= _MOST_WINDOW_S:
        raise invalid("completion_window", "give a number and s, m, h or d, such as 24h; at most 30d")
    return seconds


def _metadata(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    sound = isinstance(given, dict) and len(given) <= _MOST_KEYS
    if not sound or not all(
        len(key) <= _KEY_CHARACTERS and isinstance(value, str) and len(value) <= _VALUE_CHARACTERS
        for key, value in given.items()
    ):
        raise invalid(
            "metadata",
            f"metadata has at most {_MOST_KEYS} keys of at most {_KEY_CHARACTERS} characters, with texts of at most "
            f"{_VALUE_CHARACTERS}",
        )
    return dict(given)


def _priority(given: Any) -> int:
    number = whole(given)
    if number is None or abs(number) > _MOST_PRIORITY:
        raise invalid("priority", f"give a whole number from {-_MOST_PRIORITY} to {_MOST_PRIORITY}; higher runs first")
    return number


def router() -> APIRouter:
    """The endpoints."""
    made = APIRouter(prefix="/v1/batches", tags=["batches"])
    made.add_api_route("", create, methods=["POST"], openapi_extra=_SCHEMA)
    made.add_api_route("", page, methods=["GET"])
    made.add_api_route("/{batch_id}", get, methods=["GET"])
    made.add_api_route("/{batch_id}/cancel", cancel, methods=["POST"])
    return made
