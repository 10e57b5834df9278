"""``/health``, ``/ready`` and ``/``: how the service stands, and what there is.

None of them waits for the device, so they answer while a job runs.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.api.page import PageFile, wants_page
from app.engine import Engine, EngineStatus
from app.engine.engine import LOADING_RETRY_S
from app.errors import EngineDeadError, NotReadyError, ServiceError, ShuttingDownError
from app.settings import Settings
from fluxcore.version import __version__

ROUTES = {
    "POST /v1/generate": "draw pictures; JSON in, JSON or picture bytes out",
    "POST /v1/images/generations": "the same for clients of OpenAI's images API",
    "POST /v1/images/edits": "draw from pictures, or draw a masked part again",
    "POST /v1/images/variations": "draw pictures that are like one",
    "POST /v1/jobs": "accept a job that is drawn later and outlives a restart",
    "GET /v1/jobs": "your jobs, the newest first",
    "GET /v1/jobs/{job_id}": "how a job stands, and what came of it",
    "GET /v1/jobs/{job_id}/events": "the same as it happens, as server-sent events",
    "GET /v1/jobs/{job_id}/images/{name}": "a picture of a completed job",
    "DELETE /v1/jobs/{job_id}": "cancel a job; ?forget=true removes what is kept of it, too",
    "GET /files/{name}": "a picture that was asked for as an address",
    "GET /v1/models": "the names under which the model is served",
    "GET /v1/models/{id}": "one of them",
    "GET /health": "whether the process works; 503 when it must be restarted",
    "GET /ready": "whether jobs are taken; 503 until the model is loaded and warm",
    "GET /metrics": "counters and times for Prometheus",
    "GET /openapi.json": "the description of all routes for programs",
}


def status_routes(engine: Engine, settings: Settings, page: PageFile) -> APIRouter:
    """The routes, bound to an engine and to the page that browsers get at ``/``."""
    router = APIRouter()
    started_s = time.monotonic()

    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether the process works. True while loading and draining."""
        status = engine.status()
        body: dict[str, Any] = {
            "status": "ok" if status.is_alive else "failed",
            "state": status.state,
            "stage": status.startup.stage,
            "progress": round(status.startup.progress, 4),
            "model": status.model,
            "bundled": status.is_bundled,
            "defaults": _defaults(status, settings),
            "device": status.device,
            "version": __version__,
            "uptime_s": round(time.monotonic() - started_s, 3),
            "queue_depth": status.queue_depth,
            "running": status.running,
        }
        if status.is_alive:
            return JSONResponse(body)
        error = EngineDeadError("the service cannot draw pictures and should be restarted")
        return _unavailable(error, body)

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether jobs are taken."""
        status = engine.status()
        body: dict[str, Any] = {
            "status": status.state,
            "stage": status.startup.stage,
            "progress": round(status.startup.progress, 4),
        }
        if status.is_ready:
            return JSONResponse(body)
        return _unavailable(_why_not(status, settings), body)

    @router.get("/", response_model=None)
    async def index(request: Request) -> Response:
        """The page, for browsers; what there is, for programs."""
        if wants_page(request):
            return page.answer(request)
        routes = {"name": "fluxd", "version": __version__, "routes": ROUTES}
        return JSONResponse(routes, headers={"Vary": "Accept"})

    return router


def _defaults(status: EngineStatus, settings: Settings) -> dict[str, Any] | None:
    """What a request that leaves it open gets; no references, which have sizes of their own."""
    if status.defaults is None:
        return None
    return {
        "width": settings.default_width or status.defaults.side_px,
        "height": settings.default_height or status.defaults.side_px,
        "steps": status.defaults.steps,
        "guidance": status.defaults.guidance,
    }


def _why_not(status: EngineStatus, settings: Settings) -> ServiceError:
    match status.state:
        case "loading" | "warming_up":
            stage = f"{status.startup.stage}, {status.startup.progress:.0%}"
            return NotReadyError(
                f"the model is not ready yet ({stage})", retry_after_s=LOADING_RETRY_S
            )
        case "draining" | "stopped":
            return ShuttingDownError(
                "the service is shutting down", retry_after_s=settings.shutdown_grace_s
            )
    return EngineDeadError("the service cannot draw pictures and should be restarted")


def _unavailable(error: ServiceError, body: dict[str, Any]) -> JSONResponse:
    """The error's shape with the route's own fields beside it."""
    return JSONResponse({**error.body(), **body}, status_code=error.status, headers=error.headers)
