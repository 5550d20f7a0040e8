"""Files of clients on their way in: so many at one time, as far as the disk has room."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from flexmoe.serving.endpoints.bodies import read_form
from flexmoe.serving.errors import ApiError, busy
from flexmoe.serving.limits import Limits
from flexmoe.serving.store.files import Upload

#: Makes a file of an upload: its name in the directory of uploads, the client's name for it, and the other fields.
Keep = Callable[[str, str, Mapping[str, str]], Awaitable[Response]]


class Uploads:
    """The uploads that run.

    Args:
        directory: where they are collected.
        limits: of the server.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        self._directory, self._limits = directory, limits
        self._running = 0

    async def receive(self, request: Request, keep: Keep) -> Response:
        """Receives a file; nothing is left of one that is not kept.

        Raises:
            ApiError: it is refused, or was cut off.
            StorageError: the disk is full, or failed.
        """
        limits = self._limits
        if self._running >= limits.uploads:
            raise busy(f"{limits.uploads} uploads are running; try again when one has ended")
        announced = int(request.headers.get("content-length") or 0)
        if shutil.disk_usage(self._directory).free - announced < limits.free_disk_bytes:
            raise ApiError(507, "the disk has no room for this file; delete files or batches first", code="disk_full")
        self._running += 1
        try:
            with await run_in_threadpool(Upload, self._directory / secrets.token_hex(12)) as upload:
                filename, fields = await read_form(request, upload, limits.upload_bytes)
                await run_in_threadpool(upload.sync)
                return await keep(upload.path.name, filename, fields)
        finally:
            self._running -= 1
