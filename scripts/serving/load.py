"""Many clients at once beside a batch: what is refused, whether memory grows, and how much slower the batch becomes.

``python -m scripts.serving.load --model DIR [-o benchmarks/server.json]`` starts a server of its own, runs a batch alone, then the same
batch while 200 clients send 10,000 small requests and 100 uploads of 50 MB; every answer is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

ENDED = ("completed", "failed", "cancelled", "expired")
_PIECE = b"x" * (256 << 10)
#: What small requests ask for, in turn.
_PATHS = ("/v1/models", "/v1/batches?limit=5", "/v1/files?limit=5", "/health", "/v1/stats/performance")


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code is 1 where a request met an error other than 429."""
    parser = argparse.ArgumentParser(prog="python -m scripts.serving.load", description="Many clients beside a batch.")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint that is held in memory")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--uploads", type=int, default=100)
    parser.add_argument("--upload-mb", type=int, default=50)
    parser.add_argument("--rows", type=int, default=400, help="of the batch")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each row")
    parser.add_argument("-o", "--output", type=Path, help="write a record")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="flexmoe-load-") as home:
        record = measure(args, Path(home))
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".md").write_text(table(record), encoding="utf-8")
    print(table(record))
    return 1 if record["errors"] else 0


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Both runs on one server."""
    flags = ["--models", str(args.model), "--port", "0", "--data-dir", str(home / "data"), "--offload-dir", str(home)]
    flags += ["--percent", "100", "0", "100", "0", "100", "0", "--keep-free", "0"]
    command = [sys.executable, "-m", "flexmoe.serve", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout is not None else ""
        url = line.removeprefix("listening on ").strip().rstrip("/")
        return asyncio.run(Load(args, url, server.pid).measure())
    finally:
        server.terminate()
        server.wait()


class Load:
    """The clients.

    Args:
        args: of the command line.
        url: of the server.
        process: its id.
    """

    def __init__(self, args: argparse.Namespace, url: str, process: int) -> None:
        self._args, self._url, self._process = args, url, process
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self._bytes: list[int] = []

    async def measure(self) -> dict[str, Any]:
        """The batch alone, and with the load."""
        limits = httpx.Limits(max_connections=self._args.clients + 50)
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits) as client:
            await self._batch(client, 20)  # loads the model
            alone_s = await self._batch(client, self._args.rows)
            began_s, before = time.monotonic(), self._held()
            loaded = asyncio.create_task(self._batch(client, self._args.rows))
            await asyncio.gather(*self._clients(client), self._watch(loaded))
            load_s = time.monotonic() - began_s
            loaded_s = await loaded
        latencies = sorted(self.latencies_s)
        return {
            "clients": self._args.clients,
            "requests": self._args.requests,
            "uploads": self._args.uploads,
            "upload_mb": self._args.upload_mb,
            "rows": self._args.rows,
            "cores": os.cpu_count(),
            "batch_alone_s": alone_s,
            "batch_loaded_s": loaded_s,
            "load_s": load_s,
            "slower_percent": 100 * (loaded_s / alone_s - 1),
            "statuses": dict(sorted(self.statuses.items())),
            "errors": dict(self.errors),
            "latency_ms": {
                name: 1e3 * latencies[int(q * (len(latencies) - 1))] for name, q in (("p50", 0.5), ("p99", 0.99))
            },
            "held_mb": {"before": before / 1e6, "most": max(self._bytes) / 1e6, "after": self._held() / 1e6},
        }

    def _clients(self, client: httpx.AsyncClient) -> list[Any]:
        each = -(-self._args.requests // self._args.clients)
        small = [self._small(client, number, each) for number in range(self._args.clients)]
        slots = asyncio.Semaphore(8)
        return small + [self._upload(client, slots) for _ in range(self._args.uploads)]

    async def _small(self, client: httpx.AsyncClient, number: int, count: int) -> None:
        for at in range(count):
            await self._counted("small", client.get(_PATHS[(number + at) % len(_PATHS)]))

    async def _upload(self, client: httpx.AsyncClient, slots: asyncio.Semaphore) -> None:
        """Sends a file and deletes it; one that is refused as busy is sent again."""
        async with slots:
            while True:
                head = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
                head += b'content-disposition: form-data; name="file"; filename="a"\r\n\r\n'
                kind = {"content-type": "multipart/form-data; boundary=x"}
                answer = await self._counted("upload", client.post("/v1/files", content=self._form(head), headers=kind))
                if answer is None or answer.status_code != 429:
                    break
                await asyncio.sleep(0.2)
            if answer is not None and answer.status_code == 200:
                await self._counted("delete", client.delete(f"/v1/files/{answer.json()['id']}"))

    async def _form(self, head: bytes) -> AsyncIterator[bytes]:
        yield head
        for _ in range(self._args.upload_mb * 10**6 // len(_PIECE)):
            yield _PIECE
        yield b"\r\n--x--\r\n"

    async def _counted(self, what: str, request: Any) -> httpx.Response | None:
        began_s = time.monotonic()
        try:
            answer: httpx.Response = await request
        except httpx.HTTPError as error:
            self.errors[f"{what}: {type(error).__name__}"] += 1
            return None
        if what == "small":
            self.latencies_s.append(time.monotonic() - began_s)
        self.statuses[f"{what} {answer.status_code}"] += 1
        if answer.status_code >= 400 and answer.status_code != 429:
            self.errors[f"{what}: {answer.status_code}"] += 1
        return answer

    async def _watch(self, batch: asyncio.Task[float]) -> None:
        while not batch.done():
            self._bytes.append(self._held())
            await asyncio.sleep(0.2)

    async def _batch(self, client: httpx.AsyncClient, rows: int) -> float:
        """Runs a batch; returns the seconds between its first row and its end, as the server has them."""
        body = {
            "messages": [{"role": "user", "content": "hello world"}],
            "max_tokens": self._args.max_tokens,
            "ignore_eos": True,
        }
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        data = "".join(json.dumps({"custom_id": f"r{row}", **line}) + "\n" for row in range(rows))
        file = (await client.post("/v1/files", files={"file": ("in", data.encode())}, data={"purpose": "batch"})).json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=asked)).json()
        began_s = None
        while batch["status"] not in ENDED:
            if began_s is None and batch["status"] == "in_progress":
                began_s = time.monotonic()
            await asyncio.sleep(0.05)
            batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        if batch["request_counts"]["completed"] != rows:
            self.errors["batch: not complete"] += 1
        return time.monotonic() - (began_s or time.monotonic())

    def _held(self) -> int:
        pages = Path(f"/proc/{self._process}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    held, latency = record["held_mb"], record["latency_ms"]
    lines = [
        "# The server under load",
        "",
        f"`python -m scripts.serving.load`, on {record['cores']} cores, clients included: {record['clients']} clients, "
        f"{record['requests']} small requests, {record['uploads']} uploads of {record['upload_mb']} MB, beside a batch of "
        f"{record['rows']} rows. Target: no error but 429, memory flat, the batch at most 5 % slower.",
        "",
        "| what | measured |",
        "|---|---|",
        f"| errors other than 429 | {record['errors'] or 'none'} |",
        f"| answers | {', '.join(f'{name}: {count}' for name, count in record['statuses'].items())} |",
        f"| small requests | median {latency['p50']:.0f} ms, 99 % within {latency['p99']:.0f} ms |",
        f"| memory of the server | {held['before']:.0f} MB before, {held['most']:.0f} MB at most, {held['after']:.0f} MB after |",
        f"| the load took | {record['load_s']:.1f} s |",
        f"| the batch | {record['batch_alone_s']:.1f} s alone, {record['batch_loaded_s']:.1f} s with the load "
        f"({record['slower_percent']:+.0f} %) |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
