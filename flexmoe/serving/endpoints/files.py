"""`/v1/files`: upload, list, get, delete, content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from flexmoe.errors import StorageError
from flexmoe.serving.endpoints.bodies import described, read_object
from flexmoe.serving.endpoints.context import Context, Served, context_of
from flexmoe.serving.errors import ApiError, invalid, not_found
from flexmoe.serving.store.batches import BatchRecord
from flexmoe.serving.store.files import StoredFile

#: What a file may be for: batches run those of the first kind; the others are kept for clients that ask for them.
PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_LEAST_EXPIRY_S, _MOST_EXPIRY_S = 3600, 30 * 86400
_CHUNK_BYTES = 256 << 10
#: So many are listed at once; more are left to another thread, as they take a while.
_FEW_LISTED = 100
_FORM = described(
    {
        "required": ["file", "purpose"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": list(PURPOSES)},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer"},
        },
    },
    "multipart/form-data",
)


async def create(request: Request) -> JSONResponse:
    """Keeps a file of a client.

    The form that clients send has been received already (`flexmoe.serving.http.uploads`): what comes here is JSON with its name in the
    directory of uploads, the client's name for it, and the other fields.
    """
    context, body = context_of(request), await read_object(request)
    file = await run_in_threadpool(_keep, context, str(body["name"]), str(body["filename"]), dict(body["fields"]))
    return JSONResponse(file_object(file))


def _keep(context: Context, name: str, filename: str, fields: dict[str, str]) -> StoredFile:
    purpose = fields.pop("purpose", None)
    if purpose not in PURPOSES:
        raise invalid("purpose", f"purpose is {str(purpose)[:80]!r}; give one of {', '.join(PURPOSES)}")
    anchor, seconds = (fields.pop(f"expires_after[{part}]", None) for part in ("anchor", "seconds"))
    if fields:
        unknown = next(iter(fields))[:80]
        raise invalid(unknown, f"the field {unknown!r} is not known; remove it", "unknown_parameter")
    now_s, expires_s = context.lifecycle.now(), None
    if anchor is not None or seconds is not None:
        expires_s = now_s + expiry_s({"anchor": anchor, "seconds": seconds}, "expires_after")
    return context.files.keep(name, filename or "file", purpose, now_s, expires_s)


def expiry_s(given: Any, param: str) -> int:
    """Seconds that a file is kept.

    Args:
        given: the object of ``expires_after``.
        param: its name.

    Raises:
        ApiError: it is none.
    """
    values = given if isinstance(given, dict) else {}
    seconds = values.get("seconds")
    seconds = int(seconds) if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() else seconds
    known = values.keys() <= {"anchor", "seconds"}
    if not known or values.get("anchor") != "created_at" or not isinstance(seconds, int) or isinstance(seconds, bool):
        raise invalid(param, f'{param} has to have the anchor "created_at" and seconds')
    if not _LEAST_EXPIRY_S <= seconds <= _MOST_EXPIRY_S:
        raise invalid(f"{param}.seconds", f"give {_LEAST_EXPIRY_S} to {_MOST_EXPIRY_S} seconds")
    return seconds


async def page(
    context: Served,
    after: str | None = None,
    limit: int = Query(default=10_000, ge=1, le=10_000),
    order: str = Query(default="desc", pattern="^(asc|desc)$"),
    purpose: str | None = None,
) -> JSONResponse:
    """Files, the newest first."""

    def answer() -> JSONResponse:
        last = None if after is None else _file(context, after, "after")
        files, more = context.files.page(limit, last, purpose, ascending=order == "asc")
        return JSONResponse(listed([file_object(file) for file in files], more=more))

    return answer() if limit <= _FEW_LISTED else await run_in_threadpool(answer)


async def get(context: Served, file_id: str) -> JSONResponse:
    """One file."""
    file = context.files.get(file_id)
    if file is not None:
        return JSONResponse(file_object(file))
    return JSONResponse(await run_in_threadpool(_unfinished_file, context, file_id))


def _unfinished_file(context: Context, file_id: str) -> dict[str, Any]:
    batch, failed = _unfinished(context, file_id)
    size, _ = _lines(context, batch, failed=failed)
    name = f"{batch.id}_{'error' if failed else 'output'}.jsonl"
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": batch.in_progress_at or batch.created_at,
        "filename": name,
        "purpose": "batch_output",
        "status": "uploaded",
        "expires_at": None,
        "status_details": "the batch is running: what is done so far",
    }


def delete(context: Served, file_id: str) -> dict[str, Any]:
    """Forgets a file. Batches that were made of it keep what they need."""
    context.files.delete(_file(context, file_id, "file_id"))
    return {"id": file_id, "object": "file", "deleted": True}


def content(context: Served, file_id: str) -> StreamingResponse:
    """The bytes of a file; of a batch that runs, the lines that are done so far."""
    file = context.files.get(file_id)
    if file is None:
        batch, failed = _unfinished(context, file_id)
        size, pieces = _lines(context, batch, failed=failed)
    else:
        size, pieces = _bytes(context, file)
    headers = {
        "content-length": str(size),
        # Never the client's name for it, which may be anything.
        "content-disposition": f'attachment; filename="{file_id}.jsonl"',
        "content-security-policy": "default-src 'none'; sandbox",
    }
    return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


def _bytes(context: Context, file: StoredFile) -> tuple[int, Iterator[bytes]]:
    try:
        descriptor = open(context.files.path(file), "rb")
    except FileNotFoundError:  # deleted a moment ago
        raise not_found("file", file.id) from None

    def pieces() -> Iterator[bytes]:
        with descriptor:
            while piece := descriptor.read(_CHUNK_BYTES):
                yield piece

    return os.fstat(descriptor.fileno()).st_size, pieces()


def _unfinished(context: Context, file_id: str) -> tuple[BatchRecord, bool]:
    """The batch that runs and will have this file, and whether it is that of its errors."""
    batch = context.batches.of_file(file_id)
    if batch is None or batch.has_ended or batch.status == "validating":
        raise not_found("file", file_id)
    return batch, file_id == batch.error_file_id


def _lines(context: Context, batch: BatchRecord, *, failed: bool) -> tuple[int, Iterator[bytes]]:
    run = context.work_queue.run(batch.id)
    try:
        if run is not None:
            return run.job.lines_so_far(failed=failed)
    except StorageError:  # it ends at this moment
        pass
    raise ApiError(503, "the batch is between two states; try again", code="not_ready", retry_after_s=2)


def _file(context: Context, file_id: str, param: str) -> StoredFile:
    file = context.files.get(file_id)
    if file is None:
        raise not_found("file", file_id, param)
    return file


def file_object(file: StoredFile) -> dict[str, Any]:
    """A file as clients know it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_s,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "expires_at": file.expires_s,
        "status_details": None,
    }


def listed(data: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A page of a list."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


def router() -> APIRouter:
    """The endpoints."""
    made = APIRouter(prefix="/v1/files", tags=["files"])
    made.add_api_route("", create, methods=["POST"], openapi_extra=_FORM)
    made.add_api_route("", page, methods=["GET"])
    made.add_api_route("/{file_id}", get, methods=["GET"])
    made.add_api_route("/{file_id}", delete, methods=["DELETE"])
    made.add_api_route("/{file_id}/content", content, methods=["GET"], response_class=StreamingResponse)
    return made
