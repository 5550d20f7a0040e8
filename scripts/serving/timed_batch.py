"""A batch that is run again and again, and how long it takes."""

from __future__ import annotations

import asyncio
import json
import time

from scripts.serving.http_client import Client

ENDED = ("completed", "failed", "cancelled", "expired")
_LOOK_S = 0.1


class TimedBatch:
    """Rows that are all alike.

    Args:
        host, port: of the server.
        max_tokens: that each row generates.

    Attributes:
        completed: whether every row of every run has.
    """

    def __init__(self, host: str, port: int, max_tokens: int) -> None:
        self._client, self._max_tokens = Client(host, port), max_tokens
        self.completed = True

    async def run(self, rows: int) -> float:
        """Seconds between the start of the first row and the end of the batch."""
        form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\ncontent-disposition: form-data; '
        form += b'name="file"; filename="a"\r\n\r\n' + self._lines(rows) + b"\r\n--x--\r\n"
        kind = "multipart/form-data; boundary=x"
        file = await self._client.ask("POST", "/v1/files", pieces=iter([form]), size=len(form), kind=kind)
        asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file.json()["id"]}
        batch = (await self._client.post("/v1/batches", asked)).json()
        began_s = None
        while batch["status"] not in ENDED:
            if began_s is None and batch["status"] == "in_progress":
                began_s = time.monotonic()
            await asyncio.sleep(_LOOK_S)
            batch = (await self._client.ask("GET", f"/v1/batches/{batch['id']}")).json()
        self.completed &= batch["request_counts"]["completed"] == rows
        return time.monotonic() - (began_s or time.monotonic())

    def _lines(self, rows: int) -> bytes:
        messages = [{"role": "user", "content": "hello world"}]
        body = {"messages": messages, "max_tokens": self._max_tokens, "ignore_eos": True}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        return "".join(json.dumps({"custom_id": f"r{row}", **line}) + "\n" for row in range(rows)).encode()
