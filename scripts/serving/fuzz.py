"""Random requests, made by schemathesis of the server's own description, against a running server: none may be answered 500.

``python -m scripts.serving.fuzz [--url http://127.0.0.1:8000] [--examples N] [-o benchmarks/server-fuzz.json]``: requests that fit the
description, and such that do not; every other one asks for a file, a batch and a model that there are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import SkipTest

import httpx

#: What a server may say of itself: it is not ready, or its disk is full.
_SAID = (503, 507)


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code is 1 where a request was answered by a fault of the server."""
    parser = argparse.ArgumentParser(prog="python -m scripts.serving.fuzz", description="Random requests to a server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--examples", type=int, default=60, help="requests for each endpoint and kind (default 60)")
    parser.add_argument("-o", "--output", type=Path, help="write a record")
    args = parser.parse_args(argv)
    record = fuzz(args.url.rstrip("/"), args.examples)
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, statuses in record["statuses"].items():
        print(f"{name}: {', '.join(f'{status}: {count}' for status, count in statuses.items())}")
    print(f"{record['requests']} requests, {len(record['faults'])} answered by a fault of the server")
    return 1 if record["faults"] else 0


def fuzz(url: str, examples: int) -> dict[str, Any]:
    """So many requests of each kind for each endpoint: what they were answered, and the faults."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    limited = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    statuses: dict[str, Counter[int]] = {}
    faults: list[dict[str, Any]] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        name = f"{operation.method.upper()} {operation.path}"
        for mode in GenerationMode:
            send = _sender(url, name, statuses.setdefault(name, Counter()), faults)
            try:
                limited(given(case=operation.as_strategy(mode))(send))()
            except (SkipTest, Unsatisfiable):  # nothing of this endpoint can be wrong
                continue
    return {
        "schemathesis": version("schemathesis"),
        "requests": sum(map(Counter.total, statuses.values())),
        "statuses": {name: dict(sorted(seen.items())) for name, seen in statuses.items()},
        "faults": faults,
    }


def _sender(url: str, name: str, seen: Counter[int], faults: list[dict[str, Any]]) -> Callable[[Any], None]:
    """What sends one request and notes how it is answered."""

    def send(case: Any) -> None:
        if seen.total() % 2:
            _ask_for_what_there_is(case, _known(url))
        response = case.call(base_url=url)
        seen[response.status_code] += 1
        if response.status_code >= 500 and response.status_code not in _SAID:
            faults.append({"request": name, "status": response.status_code, "body": str(response.text)[:300]})

    return send


def _ask_for_what_there_is(case: Any, known: Mapping[str, str]) -> None:
    for values in (case.path_parameters, case.body):
        if isinstance(values, dict):
            values.update({field: known[field] for field in known.keys() & values.keys()})


def _known(url: str) -> dict[str, str]:
    """A file, a batch and a model of the server; a file and a batch are made where there is none."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2}}
    with httpx.Client(base_url=f"{url}/v1") as client:
        model = client.get("/models").json()["data"][0]["id"]
        files = client.get("/files", params={"limit": 1, "purpose": "batch"}).json()["data"]
        if not files:
            form = {"file": ("rows.jsonl", json.dumps(line).encode())}
            files = [client.post("/files", files=form, data={"purpose": "batch"}).json()]
        batches = client.get("/batches", params={"limit": 1}).json()["data"]
        if not batches:
            asked = {"input_file_id": files[0]["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
            batches = [client.post("/batches", json=asked).json()]
    return {"file_id": files[0]["id"], "input_file_id": files[0]["id"], "batch_id": batches[0]["id"], "model": model}


if __name__ == "__main__":
    sys.exit(main())
