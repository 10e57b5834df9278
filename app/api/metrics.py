"""``GET /metrics``, and what feeds it from the side of HTTP.

Owns the text form, the figures that are read off the engine when somebody looks, the
counting of answers, and the watch over the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine import Engine
from app.jobs.opening import Kept
from app.metrics import Metrics
from fluxcore.version import __version__

# Blocks of the event loop as long as this, or longer, are seen.
LAG_INTERVAL_S = 0.05
METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})
UNKNOWN_ROUTE = "unknown"


class EngineCollector(Collector):
    """How the engine stands at the moment of the look."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing beforehand: what there is depends on the device."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        status, figures = self._engine.status(), self._engine.figures()
        for name, text, value in (
            ("fluxd_queue_depth", "Jobs that wait.", status.queue_depth),
            ("fluxd_jobs_running", "Jobs that have begun and need the device.", status.running),
            ("fluxd_jobs_in_flight", "Those and the ones being packed.", figures.in_flight),
            ("fluxd_queue_work_seconds", "Estimated work accepted and not done.", figures.work_s),
            ("fluxd_alive", "Whether /health says yes.", int(status.is_alive)),
            ("fluxd_ready", "Whether /ready says yes.", int(status.is_ready)),
            ("fluxd_distinct_shapes", "Different sizes of jobs begun so far.", figures.shapes),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        memory = GaugeMetricFamily(
            "fluxd_memory_bytes", "Memory by place, as the device tells it.", labels=["place"]
        )
        for place, size in figures.memory_bytes.items():
            memory.add_metric([place], size)
        yield memory
        cache = figures.cache
        if cache is not None:
            for name, text, value in (
                ("fluxd_conditioning_cache_hits", "Prompts found in the cache.", cache.hits),
                ("fluxd_conditioning_cache_misses", "Prompts that had to be read.", cache.misses),
            ):
                yield CounterMetricFamily(name, text, value=value)
            yield GaugeMetricFamily(
                "fluxd_conditioning_cache_bytes", "Memory of the cache.", value=cache.bytes_used
            )
        info = {"version": __version__, "model": status.model or "", **status.device}
        model = GaugeMetricFamily(
            "fluxd_model_info", "What is served where; always 1.", labels=list(info)
        )
        model.add_metric(list(info.values()), 1)
        yield model


class KeptCollector(Collector):
    """How what outlives the process stands at the moment of the look."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def describe(self) -> list[Metric]:
        """Nothing beforehand, as for the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        jobs = self._kept.jobs
        for name, text, value in (
            ("fluxd_kept_jobs", "Accepted jobs of /v1/jobs that have not ended.", jobs.unfinished),
            (
                "fluxd_kept_disk_failing",
                "Whether the data directory takes nothing; 1 is to be looked into.",
                int(jobs.is_disk_failing),
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        told = CounterMetricFamily(
            "fluxd_webhooks", "Webhooks: told, attempts failed, given up.", labels=["result"]
        )
        for result, count in self._kept.webhooks.counts.items():
            told.add_metric([result], count)
        yield told


def metrics_routes(engine: Engine, metrics: Metrics, kept: Kept | None = None) -> APIRouter:
    """The route, bound to an engine, its metrics and what is kept."""
    router = APIRouter()
    metrics.registry.register(EngineCollector(engine))
    if kept is not None:
        metrics.registry.register(KeptCollector(kept))

    documented: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    }

    @router.get("/metrics", response_class=Response, responses=documented)
    async def show(request: Request) -> Response:
        """All metrics, in Prometheus' text form or OpenMetrics as ``Accept`` asks."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"Content-Type": content_type})

    return router


class Measured:
    """Counts every answer. A plain ASGI middleware, the outermost one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            # The route's pattern, never the path: a client could make as many as it likes.
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.answered(method, route, status, time.monotonic() - began_s)


@asynccontextmanager
async def loop_watched(metrics: Metrics) -> AsyncIterator[None]:
    """Measure how late the event loop's timers come, for as long as the context lasts."""

    async def watch() -> None:
        while True:
            due_s = time.monotonic() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            metrics.lagged(max(0.0, time.monotonic() - due_s))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
