"""The clients of the load: small requests one after another on connections of their own, and uploads eight at a time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

from scripts.serving.http_client import Answer, Client

_PIECE = b"x" * (256 << 10)
_HEAD = (
    b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n'
)
_TAIL = b"\r\n--x--\r\n"
_UPLOADS_AT_ONCE = 8
#: What small requests ask for, in turn.
PATHS = ("/v1/models", "/v1/batches?limit=5", "/v1/files?limit=5", "/health", "/v1/stats/performance")


class Clients:
    """Sends a load and counts what comes of it.

    Args:
        host, port: of the server.
        seconds: over which the requests are spread; 0: each is sent when the one before it is answered.

    Attributes:
        statuses: answers by kind of request and status.
        errors: answers that are neither a success nor 429, and requests without an answer.
        wall_s: that the load took, of all runs together.
    """

    def __init__(self, host: str, port: int, *, seconds: float = 0.0) -> None:
        self._host, self._port, self._seconds = host, port, seconds
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.wall_s = 0.0
        self._latencies_s: list[float] = []

    async def run(self, clients: int, requests: int, uploads: int, upload_mb: int) -> None:
        """Sends all of it."""
        began_s = time.monotonic()
        each, slots = -(-requests // clients), asyncio.Semaphore(_UPLOADS_AT_ONCE)
        small = [self._small(number, each, clients) for number in range(clients)]
        large = [self._upload(slots, upload_mb, self._seconds * at / max(1, uploads)) for at in range(uploads)]
        await asyncio.gather(*small, *large)
        self.wall_s += time.monotonic() - began_s

    def latencies_ms(self) -> dict[str, float]:
        """Of small requests."""
        ordered = sorted(self._latencies_s)
        return {name: 1e3 * ordered[int(q * (len(ordered) - 1))] for name, q in (("p50", 0.5), ("p99", 0.99))}

    async def _small(self, number: int, count: int, clients: int) -> None:
        began_s, pause_s = time.monotonic(), self._seconds / count
        client = Client(self._host, self._port)
        for at in range(count):
            due_s = began_s + pause_s * (at + number / clients)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()) if pause_s else 0)
            await self._counted("small", client, "GET", PATHS[(number + at) % len(PATHS)])
        client.close()

    async def _upload(self, slots: asyncio.Semaphore, upload_mb: int, after_s: float) -> None:
        """Sends a file and deletes it; one that is refused as busy is sent again."""
        await asyncio.sleep(after_s)
        async with slots:
            client = Client(self._host, self._port)
            answer = await self._counted("upload", client, "POST", "/v1/files", upload_mb)
            while answer is not None and answer.status == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))
                answer = await self._counted("upload", client, "POST", "/v1/files", upload_mb)
            if answer is not None and answer.status == 200:
                await self._counted("delete", client, "DELETE", f"/v1/files/{answer.json()['id']}")
            client.close()

    async def _counted(
        self, what: str, client: Client, method: str, path: str, upload_mb: int | None = None
    ) -> Answer | None:
        began_s = time.monotonic()
        try:
            if upload_mb is None:
                answer = await client.ask(method, path)
            else:
                size, kind = _form_bytes(upload_mb), "multipart/form-data; boundary=x"
                answer = await client.ask(method, path, pieces=_form(upload_mb), size=size, kind=kind)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            self.errors[f"{what}: {type(error).__name__}"] += 1
            return None
        if what == "small":
            self._latencies_s.append(time.monotonic() - began_s)
        self.statuses[f"{what} {answer.status}"] += 1
        if answer.status >= 400 and answer.status != 429:
            self.errors[f"{what}: {answer.status}"] += 1
        return answer


def _pieces(upload_mb: int) -> int:
    return upload_mb * 10**6 // len(_PIECE)


def _form(upload_mb: int) -> Iterator[bytes]:
    yield _HEAD
    for _ in range(_pieces(upload_mb)):
        yield _PIECE
    yield _TAIL


def _form_bytes(upload_mb: int) -> int:
    return len(_HEAD) + _pieces(upload_mb) * len(_PIECE) + len(_TAIL)
