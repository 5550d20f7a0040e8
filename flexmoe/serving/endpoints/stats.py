"""How the server is: `/health`, `/ready`, `/v1/stats/…`, and `/metrics` for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from flexmoe.serving.endpoints.context import Context, Served
from flexmoe.system.memory import resident_bytes


class Metrics(Collector):
    """What Prometheus reads of a server, copied when it asks.

    Args:
        context: of the server.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        context = self._context
        waiting, running = context.work_queue.requests
        yield _gauge("requests_waiting", "completions that wait for the engine", waiting)
        yield _gauge("requests_running", "completions in the engine", running)
        open_batches = context.batches.open()
        states = GaugeMetricFamily("flexmoe_batches_open", "batches that have not ended", labels=["status"])
        for status in ("validating", "in_progress", "finalizing", "cancelling"):
            states.add_metric([status], sum(batch.status == status for batch in open_batches))
        yield states
        done = [run.progress for run in context.work_queue.runs()]
        rows_left = sum(each.rows - each.ok - each.failed for each in done)
        yield _gauge("rows_left", "rows of open batches without a line", rows_left)
        for name, count in context.stats.totals().items():
            yield CounterMetricFamily(f"flexmoe_{name}", f"{name.replace('_', ' ')} since the start", value=count)
        yield CounterMetricFamily("flexmoe_model_loads", "engines that were loaded", value=context.stats.loads)
        yield CounterMetricFamily("flexmoe_engine_failures", "engines that failed", value=context.stats.failures)
        yield _gauge("process_bytes", "memory that the process holds", resident_bytes())
        yield _gauge("disk_free_bytes", "free on the disk of the data", context.files.free_bytes())
        yield _gauge("ready", "whether all batches of the last start are at work", int(context.lifecycle.is_ready))


class PerformanceReport:
    """What `/v1/stats/performance` answers, encoded anew only when something of it has changed.

    Args:
        context: of the server.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._encoded: tuple[Any, bytes] = (None, b"")

    def encoded(self) -> bytes:
        """As JSON."""
        context, engine = self._context, self._context.engine
        waiting, running = context.work_queue.requests
        state = {"state": engine.state, "loaded": engine.loaded, "requests": {"waiting": waiting, "running": running}}
        key = (context.stats.version, engine.state, engine.loaded, waiting, running)
        known, body = self._encoded
        if key != known:
            body = json.dumps(state | context.stats.performance(), ensure_ascii=False).encode()
            self._encoded = key, body
        return body


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"flexmoe_{name}", text, value=value)


async def health(context: Served) -> JSONResponse:
    """Whether the server's threads are alive."""
    alive = context.engine.is_alive()
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def ready(context: Served) -> JSONResponse:
    """Whether every batch that was open when the server started is at work again."""
    is_ready = context.lifecycle.is_ready
    state = {"status": "ready" if is_ready else "recovering"}
    return JSONResponse(state, 200) if is_ready else JSONResponse(state, 503, {"retry-after": "2"})


async def memory(context: Served) -> JSONResponse:
    """Planned bytes of every tier beside its budget."""
    return JSONResponse(context.stats.memory())


async def performance(request: Request) -> Response:
    """Speed, lanes, policy, bottleneck, advice, and the time that batches still take."""
    report: PerformanceReport = request.app.state.performance
    return Response(report.encoded(), media_type="application/json")


def experts(context: Served) -> JSONResponse:
    """How often each expert was chosen."""
    return JSONResponse(context.stats.experts())


def metrics(request: Request) -> Response:
    """For Prometheus."""
    held: Metrics = request.app.state.metrics
    return Response(generate_latest(held.registry), media_type=CONTENT_TYPE_LATEST)


def router() -> APIRouter:
    """The endpoints."""
    made = APIRouter(tags=["server"])
    made.add_api_route("/health", health, methods=["GET"])
    made.add_api_route("/ready", ready, methods=["GET"])
    made.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)
    made.add_api_route("/v1/stats/memory", memory, methods=["GET"])
    made.add_api_route("/v1/stats/performance", performance, methods=["GET"], response_class=JSONResponse)
    made.add_api_route("/v1/stats/experts", experts, methods=["GET"])
    return made
