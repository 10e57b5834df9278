"""Wiring: settings, engine, HTTP app and server process.

Owns nothing but the order in which the parts are made, started and ended.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from starlette.types import Scope

from app import telemetry
from app.api.drawing import Drawing
from app.api.errors import install_error_handlers
from app.api.generate import generate_routes
from app.api.heads import with_heads
from app.api.idempotency import Idempotency
from app.api.jobs import JOBS_PATH, job_routes
from app.api.metrics import Measured, loop_watched, metrics_routes
from app.api.middleware import RequestContext
from app.api.openai.models import ModelNames, model_routes
from app.api.openai.routes import image_routes
from app.api.page import INDEX, page_files, page_routes
from app.api.picture_links import PictureLinks, link_routes
from app.api.security.connection import bounded_protocol
from app.api.security.document import describe_guard
from app.api.security.exposure import exposure_warnings
from app.api.security.guard import Guard
from app.api.status import status_routes
from app.engine import Engine, Limits, Loader, LoadStep, Pipeline
from app.event_loop import ACCEPTED_A_ROUND
from app.jobs.opening import Kept, open_kept
from app.settings import Settings, SettingsError
from fluxcore.bundled import BUNDLED_NAME
from fluxcore.version import __version__

logger = logging.getLogger(__name__)

LISTEN_BACKLOG = 512
# How long an idle connection stays open. Longer than clients keep one, so that none is
# closed under a request that is just being sent.
KEEP_ALIVE_S = 75
# Time for the last answers to be written once no job runs, in seconds.
LAST_ANSWERS_S = 5

# Said wherever the bundled model is used because no other was named.
BUNDLED_NOTE = (
    f"no model is named: using the bundled {BUNDLED_NAME}, which draws coloured shapes, not "
    "photographs; for the real one give --model path/to/FLUX.2-klein-4B"
)

EXIT_OK = 0
EXIT_FAILURE = 1


def pipeline_loader(model: Path | None, settings: Settings) -> Loader:
    """How the engine gets its pipeline; the framework is imported on its thread.

    Args:
        model: checkpoint directory; None for the bundled model.
    """

    def load(progress: Callable[[LoadStep], None]) -> Pipeline:
        # What importing makes stays, 260 thousand objects. To look through them for garbage
        # stops all threads, the event loop's among them, for up to 0.4 s each time.
        gc.disable()
        try:
            from fluxcore import FluxPipeline
        finally:
            gc.enable()
        gc.freeze()

        pipeline = FluxPipeline.load(
            model,
            device=settings.device,
            dtype=settings.dtype,
            progress=progress,
            residency=settings.residency,
            conditioning_cache_bytes=settings.conditioning_cache_bytes,
            conditioning_store=settings.conditioning_store_path,
            conditioning_store_bytes=settings.conditioning_store_bytes,
            precision=settings.precision,
            kernels=settings.kernels,
            compile_networks=settings.compile,
            compiled_store=settings.compiled_store_path,
            cuda_graphs=settings.cuda_graphs,
            batching=settings.batching,
        )
        # So do the model and what it has imported.
        gc.collect()
        gc.freeze()
        return pipeline

    return load


def create_engine(settings: Settings, load: Loader) -> Engine:
    """The engine that the settings ask for; not started."""
    return Engine(
        load,
        limits=Limits(
            jobs=settings.queue_limit,
            pixels=settings.queue_pixels,
            work_s=settings.queue_work_s,
            in_flight=settings.in_flight_limit,
        ),
        warm_up_sizes=settings.warm_up_sizes_px,
        joins=settings.batching != "off",
        shutdown_grace_s=settings.shutdown_grace_s,
    )


def create_app(settings: Settings, engine: Engine, kept: Kept | None = None) -> FastAPI:
    """The HTTP app; starts and stops the engine, and what is kept, with its own life."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        if kept is not None:
            await asyncio.to_thread(kept.start)
        # On one of anyio's threads, whose own 0.05 s of importing are thereby over, too.
        await anyio.to_thread.run_sync(build_routes, app)
        async with loop_watched(engine.metrics):
            yield
        await asyncio.to_thread(engine.stop, settings.shutdown_grace_s)
        if kept is not None:
            await asyncio.to_thread(kept.close)

    app = FastAPI(
        title="fluxd",
        version=__version__,
        lifespan=lifespan,
        # The pages of these two load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    links = PictureLinks(settings.picture_link_bytes, settings.picture_link_lifetime_s)
    app.add_middleware(
        Idempotency,
        answers=None if kept is None else kept.answers,
        links=links,
        own_paths=(JOBS_PATH,),
    )
    app.add_middleware(Guard, settings=settings, metrics=engine.metrics)
    app.add_middleware(RequestContext)
    # Added last, and so the outermost.
    app.add_middleware(Measured, metrics=engine.metrics)
    install_error_handlers(app)
    drawing = Drawing(engine, settings)
    names = ModelNames(engine, settings)
    page = page_files()
    for router in (
        generate_routes(drawing),
        image_routes(drawing, links, names),
        with_heads(model_routes(names)),
        with_heads(link_routes(links)),
        with_heads(job_routes(drawing, kept)),
        with_heads(page_routes(page)),
        with_heads(status_routes(engine, settings, page[INDEX])),
        with_heads(metrics_routes(engine, engine.metrics, kept)),
    ):
        # As they are: of a router that is included, each request looks for its route twice.
        app.router.routes.extend(router.routes)
    describe_guard(app, settings)
    return app


def build_routes(app: FastAPI) -> None:
    """Make what FastAPI makes of each route when a request is first compared with it.

    All routes together take 0.1 s, in which the event loop would answer nobody.
    """
    scope: Scope = {"type": "http", "method": "GET", "path": "", "root_path": "", "headers": []}
    for route in app.routes:
        route.matches(scope)


def openapi_document(settings: Settings) -> dict[str, Any]:
    """What ``GET /openapi.json`` answers under these settings; nothing is loaded or started."""
    engine = create_engine(settings, pipeline_loader(settings.model, settings))
    return create_app(settings, engine).openapi()


class Server(uvicorn.Server):
    """Ends in order: refuses new jobs while it still answers, then closes.

    Differs from uvicorn's, which stops listening first and dies of the signal again
    after an orderly end: here SIGTERM ends in exit status 0.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, kept: Kept | None, grace_s: float
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._kept = kept
        self._grace_s = grace_s
        self.is_engine_stopped = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at the first signal; at the second, without waiting for the running job."""
        if self.should_exit:
            self._engine.hurry()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        for listener in sockets or []:
            # asyncio has set it to as many as it accepts in one round.
            listener.listen(LISTEN_BACKLOG)
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            logger.info("listening on http://%s:%d", shown, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engine while requests are still answered, then close."""
        if self._engine.is_idle:
            logger.info("shutting down")
        else:
            told = "shutting down; jobs that run have %g s, a second signal ends them"
            logger.info(told, self._grace_s)
        self.is_engine_stopped = await asyncio.to_thread(self._engine.stop, self._grace_s)
        if self._kept is not None:
            # Lets go of those who watch jobs, whose connections would be waited for.
            await asyncio.to_thread(self._kept.jobs.close)
        await super().shutdown(sockets)


def create_server(settings: Settings, engine: Engine) -> Server:
    """The server of the app, not yet running; ``run`` takes the sockets to listen on.

    Raises:
        SettingsError: the data directory cannot be used.
    """
    kept = open_kept(settings, engine)
    config = uvicorn.Config(
        create_app(settings, engine, kept),
        http=bounded_protocol(settings, engine.metrics),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        loop="app.event_loop:new_event_loop",
        backlog=ACCEPTED_A_ROUND,
    )
    return Server(config, engine, kept, settings.shutdown_grace_s)


def serve(settings: Settings, engine: Engine) -> int:
    """Run the service until a signal ends it.

    Returns:
        The process's exit status: 0 after an orderly end.

    Raises:
        SettingsError: it cannot listen on the address, or use the data directory.
    """
    for warning in exposure_warnings(settings):
        logger.warning(warning)
    listener = listen(settings.host, settings.port)
    server = create_server(settings, engine)

    def end() -> None:
        server.should_exit = True

    engine.on_startup_failure = end
    server.run(sockets=[listener])
    if engine.has_failed:
        return EXIT_FAILURE
    if not server.is_engine_stopped:
        logger.error("the device did not come back from the running job; leaving without it")
        # The interpreter's own end would abort under a thread that is still in native code.
        logging.shutdown()
        os._exit(EXIT_FAILURE)
    logger.info("ended")
    return EXIT_OK


def serve_checkpoint(
    settings: Settings,
    log: TextIO | None = None,
    follow: Callable[[Engine], None] | None = None,
) -> int:
    """Load the checkpoint of the settings, else the bundled one, and serve it; see ``serve``.

    Args:
        log: where log lines go; standard error when left out.
        follow: is given the engine, before it starts.

    Raises:
        SettingsError: it cannot listen on the address.
    """
    telemetry.configure_logging(settings.log_level, settings.log_format, log)
    if settings.model is None:
        logger.info(BUNDLED_NOTE)
    engine = create_engine(settings, pipeline_loader(settings.model, settings))
    if follow is not None:
        follow(engine)
    return serve(settings, engine)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=LISTEN_BACKLOG)
        # Connections inherit it; asyncio sets it only on those whose listener it made itself.
        # Without it an answer's body waits 40 ms for its head to be acknowledged.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose others with --host and --port"
        ) from None
