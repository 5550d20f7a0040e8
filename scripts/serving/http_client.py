"""A client of HTTP/1.1 that costs little itself: one connection, kept alive, and bodies that are sent in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_RECEIVED_BYTES = 1 << 20
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a server."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Client:
    """One connection, made when it is needed; one request at a time.

    Args:
        host, port: of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self, method: str, path: str, *, pieces: Iterator[bytes] | None = None, size: int = 0, kind: str = ""
    ) -> Answer:
        """Sends a request and reads its answer.

        Args:
            pieces: of the body, ``size`` bytes of type ``kind`` together.

        Raises:
            OSError, asyncio.TimeoutError: there is no answer.
        """
        try:
            return await asyncio.wait_for(self._ask(method, path, pieces, size, kind), _TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    async def post(self, path: str, value: Any) -> Answer:
        """Sends JSON."""
        data = json.dumps(value).encode()
        return await self.ask("POST", path, pieces=iter([data]), size=len(data), kind="application/json")

    def close(self) -> None:
        """Hangs up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _ask(self, method: str, path: str, pieces: Iterator[bytes] | None, size: int, kind: str) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, limit=_RECEIVED_BYTES)
        reader, writer = self._streams
        body = f"content-type: {kind}\r\ncontent-length: {size}\r\n" if pieces is not None else ""
        writer.write(f"{method} {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n{body}\r\n".encode())
        for piece in pieces or ():
            writer.write(piece)
            await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        answer = Answer(int(head[0].split(" ")[1]), headers, await reader.readexactly(int(headers["content-length"])))
        if headers.get("connection") == "close":
            self.close()
        return answer
