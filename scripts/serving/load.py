"""Many clients at once beside a batch: what is refused, whether memory grows, and how much slower the batch becomes.

``python -m scripts.serving.load --model DIR [-o benchmarks/server-load.json]`` starts a server of its own and runs the same batch
again and again: alone, then while 200 clients send 10,000 small requests and 100 uploads of 50 MB, then alone again, and so on. Every
answer is counted. The clients run on the same machine, at the lowest priority: elsewhere they would not take the server's cores at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

from flexmoe.system.machine import cpu_name, usable_cores
from scripts.serving.clients import Clients
from scripts.serving.processes import Watch, children, cpu_s
from scripts.serving.timed_batch import TimedBatch

_ASKED = ("clients", "requests", "uploads", "upload_mb", "rows", "max_tokens", "seconds", "repeats")


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code is 1 where a request met an error other than 429, or the batch did not complete."""
    parser = argparse.ArgumentParser(prog="python -m scripts.serving.load", description="Many clients beside a batch.")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint that is held in memory")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--uploads", type=int, default=100)
    parser.add_argument("--upload-mb", type=int, default=50)
    parser.add_argument("--rows", type=int, default=400, help="of the batch")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each row")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="spread the requests over so long (default 0: as fast as they go)"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs with the load, between runs without (default 1)")
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
    """All runs on one server."""
    flags = ["--models", str(args.model), "--port", "0", "--data-dir", str(home / "data"), "--offload-dir", str(home)]
    flags += ["--percent", "100", "0", "100", "0", "100", "0", "--keep-free", "0"]
    command = [sys.executable, "-m", "flexmoe.serve", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    os.nice(19)
    try:
        line = server.stdout.readline() if server.stdout is not None else ""
        url = urlsplit(line.removeprefix("listening on ").strip())
        return asyncio.run(_measure(args, str(url.hostname), int(url.port or 0), server.pid))
    finally:
        server.terminate()
        server.wait()


async def _measure(args: argparse.Namespace, host: str, port: int, process: int) -> dict[str, Any]:
    batch = TimedBatch(host, port, args.max_tokens)
    clients = Clients(host, port, seconds=args.seconds)
    await batch.run(20)  # loads the model
    [gateway] = children(process)
    watch, own_s, outlasted = Watch(process, gateway), 0.0, False
    alone, loaded = [await _run(batch, args.rows, process, gateway)], []
    for _ in range(args.repeats):
        began_s = _own_cpu_s()
        async with watch:
            load = asyncio.create_task(clients.run(args.clients, args.requests, args.uploads, args.upload_mb))
            loaded.append(await _run(batch, args.rows, process, gateway))
            own_s, outlasted = own_s + _own_cpu_s() - began_s, outlasted or not load.done()
            await load
        alone.append(await _run(batch, args.rows, process, gateway))
    watch.note()
    errors = dict(clients.errors) | ({} if batch.completed else {"batch: not complete": 1})
    return {
        "machine": {"cpu": cpu_name(), "cores": usable_cores()},
        "asked": {name: getattr(args, name) for name in _ASKED},
        "alone": alone,
        "loaded": loaded,
        "slower_percent": 100 * (_mean_s(loaded) / _mean_s(alone) - 1),
        "load_s": clients.wall_s,
        "load_outlasted_batch": outlasted,
        "clients_cpu_s": own_s,
        "statuses": dict(sorted(clients.statuses.items())),
        "errors": errors,
        "latency_ms": clients.latencies_ms(),
        "held_mb": watch.held_mb(),
    }


def _mean_s(runs: list[dict[str, float]]) -> float:
    return fmean(run["wall_s"] for run in runs)


async def _run(batch: TimedBatch, rows: int, engine: int, gateway: int) -> dict[str, float]:
    """Runs the batch once: seconds by the clock, and of the processor in both processes of the server."""
    before_s = cpu_s(engine), cpu_s(gateway)
    wall_s = await batch.run(rows)
    return {
        "wall_s": wall_s,
        "engine_cpu_s": cpu_s(engine) - before_s[0],
        "gateway_cpu_s": cpu_s(gateway) - before_s[1],
    }


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    asked, held, latency = record["asked"], record["held_mb"], record["latency_ms"]
    pace = f"spread over {asked['seconds']:.0f} s" if asked["seconds"] else "as fast as they go"
    lines = [
        "# The server under load",
        "",
        f"`python -m scripts.serving.load` on {record['machine']['cores']} cores of {record['machine']['cpu']}, clients included: "
        f"{asked['clients']} clients, {asked['requests']} small requests and {asked['uploads']} uploads of {asked['upload_mb']} MB, "
        f"{pace}, beside a batch of {asked['rows']} rows with {asked['max_tokens']} tokens each. {asked['repeats']} runs with the load are "
        "between runs without, on one server. Target: no error but 429, memory flat, the batch at most 5 % slower.",
        "",
        "| what | measured |",
        "|---|---|",
        f"| errors other than 429 | {record['errors'] or 'none'} |",
        f"| answers | {', '.join(f'{name}: {count}' for name, count in record['statuses'].items())} |",
        f"| small requests | median {latency['p50']:.0f} ms, 99 % within {latency['p99']:.0f} ms |",
        f"| memory of both processes | {held['before']:.0f} MB before, {held['most']:.0f} MB at most, "
        f"{held['first_half']:.0f} MB and {held['second_half']:.0f} MB on average in the halves of the load, "
        f"{held['after']:.0f} MB after |",
        f"| the load | {record['load_s']:.1f} s{', longer than the batch' if record['load_outlasted_batch'] else ''}; "
        f"the clients themselves took {record['clients_cpu_s']:.1f} CPU-s |",
        f"| the batch alone | {_seconds(record['alone'])} |",
        f"| the batch with the load | {_seconds(record['loaded'])} |",
        f"| slower, by the means | {record['slower_percent']:+.1f} % |",
    ]
    return "\n".join(lines) + "\n"


def _seconds(runs: list[dict[str, float]]) -> str:
    engine, gateway = (", ".join(f"{run[name]:.0f}" for run in runs) for name in ("engine_cpu_s", "gateway_cpu_s"))
    walls = ", ".join(f"{run['wall_s']:.1f} s" for run in runs)
    return f"{walls} (CPU-s of the engine's process: {engine}; of the gateway's: {gateway})"


if __name__ == "__main__":
    sys.exit(main())
