"""Random requests, made by schemathesis of the server's own description, against a running server: none may be answered 500.

``python -m scripts.serving.fuzz [--url http://127.0.0.1:8000] [--examples N] [-o benchmarks/server-fuzz.json]``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code is 1 where a request was answered by a fault of the server."""
    parser = argparse.ArgumentParser(prog="python -m scripts.serving.fuzz", description="Random requests to a server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--examples", type=int, default=60, help="requests for each endpoint (default 60)")
    parser.add_argument("-o", "--output", type=Path, help="write a record")
    args = parser.parse_args(argv)
    record = fuzz(args.url, args.examples)
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, statuses in record["statuses"].items():
        print(f"{name}: {', '.join(f'{status}: {count}' for status, count in statuses.items())}")
    print(f"{record['requests']} requests, {len(record['faults'])} answered by a fault of the server")
    return 1 if record["faults"] else 0


def fuzz(url: str, examples: int) -> dict[str, Any]:
    """So many requests for each endpoint: what they were answered, and the faults."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: dict[str, Counter[int]] = {}
    faults: list[dict[str, Any]] = []
    limited = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        name = f"{operation.method.upper()} {operation.path}"
        send = _sender(url, name, statuses.setdefault(name, Counter()), faults)
        limited(given(case=operation.as_strategy())(send))()
    return {
        "schemathesis": version("schemathesis"),
        "requests": sum(map(Counter.total, statuses.values())),
        "statuses": {name: dict(sorted(seen.items())) for name, seen in statuses.items()},
        "faults": faults,
    }


def _sender(url: str, name: str, seen: Counter[int], faults: list[dict[str, Any]]) -> Callable[[Any], None]:
    """What sends one request and notes how it is answered."""

    def send(case: Any) -> None:
        response = case.call(base_url=url)
        seen[response.status_code] += 1
        if response.status_code >= 500 and response.status_code not in (503, 507):
            faults.append({"request": name, "status": response.status_code, "body": str(response.text)[:300]})

    return send


if __name__ == "__main__":
    sys.exit(main())
