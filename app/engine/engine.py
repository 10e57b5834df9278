"""The engine as the rest of the service sees it: submit a job, ask how it stands, stop.

Puts the scheduler, the worker and the packing threads together and decides which
error a job gets that none of them can run. Knows nothing of HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from app import telemetry
from app.engine.admission import Limits
from app.engine.contract import Cache, Loader, Model, Pipeline, Resolved, Result
from app.engine.events import Preview
from app.engine.flight import FlightTimes, PreviewPicture
from app.engine.jobs import DEFAULT_OPTIONS, Job, JobOptions, JobOutcome
from app.engine.metadata import provenance
from app.engine.packing import PackedPicture, Packing, PackingPool
from app.engine.scheduler import Scheduler
from app.engine.worker import Startup, Worker, WorkerState
from app.errors import (
    EngineDeadError,
    InternalError,
    NotReadyError,
    QueueFullError,
    ServiceError,
    ShuttingDownError,
)
from app.metrics import Metrics
from fluxcore.fitting import fitted_size
from fluxcore.params import GenerationParams

logger = logging.getLogger(__name__)

# When a client may ask again while the model is being loaded, in seconds.
LOADING_RETRY_S = 5.0
# How long a cancelled job may take to reach its next slice at the end, in seconds.
LAST_SLICE_S = 10.0
POLL_S = 0.02
# How long an answer is left alone with the interpreter before the job's line is written.
ANSWER_LEAD_S = 0.002
# Different shapes that are counted; more are as bad as so many.
MOST_SHAPES = 10_000

Shape = tuple[int, int, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """What the loaded model draws with where a request leaves it open.

    Attributes:
        side_px: width and height.
        guidance: None where the model takes none.
    """

    side_px: int
    steps: int
    guidance: float | None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for health and readiness.

    Attributes:
        state: loading, warming_up, ready, draining, stopped or failed.
        is_alive: the worker runs, moves on, and the device draws pictures.
        running: jobs in flight that need the device again.
        startup: how far getting ready has come.
        model: its name; None while loading.
        is_bundled: whether it is the one that ships with the package; None while loading.
        defaults: None while loading.
        device: what the runtime says of itself; empty while loading.
    """

    state: str
    is_alive: bool
    is_ready: bool
    startup: Startup
    model: str | None
    is_bundled: bool | None
    defaults: ModelDefaults | None
    device: dict[str, str]
    queue_depth: int
    running: int


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What an operator watches; see ``app.api.metrics`` for what each means.

    Attributes:
        work_s: estimated seconds of all that waits and runs.
        shapes: different sizes of pictures and references drawn so far, which compiled
            kernels and Metal's memory grow with.
        cache: None while loading.
    """

    in_flight: int
    work_s: float
    shapes: int
    memory_bytes: Mapping[str, int]
    cache: Cache | None


class Engine:
    """Owns the job from its admission to its answer.

    Args:
        load: makes the pipeline, on the worker's thread.
        limits: what may wait and be in flight.
        warm_up_sizes: (width, height) of pictures drawn before the engine is ready; None
            for the model's default size.
        joins: whether steps of several jobs may be taken as one, where trials show that to pay.
        shutdown_grace_s: what a client is told to wait when the engine is ending.
        on_startup_failure: called, on the worker's thread, when the model cannot be used.
    """

    def __init__(
        self,
        load: Loader,
        *,
        limits: Limits | None = None,
        warm_up_sizes: tuple[tuple[int, int], ...] | None = (),
        joins: bool = False,
        shutdown_grace_s: float = 30.0,
        on_startup_failure: Callable[[], None] | None = None,
    ) -> None:
        self._scheduler = Scheduler(limits or Limits(), joins=joins)
        self._packers = PackingPool()
        self.metrics = Metrics()
        self._shapes: set[Shape] = set()
        self._worker = Worker(
            load,
            self._scheduler,
            self.metrics,
            warm_up_sizes=warm_up_sizes,
            on_drawn=self._drawn,
            on_preview=self._previewed,
            on_failed=self._failed,
            on_end=self._worker_ended,
        )
        self._grace_s = shutdown_grace_s
        self._is_draining = False
        self._hurry = threading.Event()
        self._has_ended: bool | None = None
        self.on_startup_failure = on_startup_failure

    @property
    def has_failed(self) -> bool:
        """Whether the worker ended by a failure: the model was unusable, or worse."""
        return self._worker.state is WorkerState.FAILED

    @property
    def is_idle(self) -> bool:
        """Whether no job waits, runs or is being packed."""
        return self._scheduler.in_flight == 0 and self._scheduler.depth == 0

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._worker.start()

    def check_admission(self, client: str = DEFAULT_OPTIONS.client) -> None:
        """Refuse a request of a client before its pictures are decoded.

        Raises:
            EngineDeadError, ShuttingDownError, NotReadyError, QueueFullError.
        """
        with self._rejections_counted():
            self._pipeline()
            self._scheduler.check(client)

    def default_side_px(self) -> int:
        """Width and height of a picture of which neither is asked.

        Raises:
            EngineDeadError, ShuttingDownError, NotReadyError.
        """
        with self._rejections_counted():
            return self._pipeline().info.default_side_px

    def check_request(self, params: GenerationParams) -> Resolved:
        """Refuse a request that is to be submitted some other time.

        Returns:
            It with every default of the loaded model filled in.

        Raises:
            InvalidParamsError: it does not fit the loaded model.
            EngineDeadError, ShuttingDownError, NotReadyError.
        """
        return self._pipeline().prepare(params).params

    def submit(
        self,
        params: GenerationParams,
        packing: Packing,
        request_id: str,
        options: JobOptions = DEFAULT_OPTIONS,
    ) -> Job:
        """Accept a request, or refuse it at once.

        Where ``params`` has no seed, one is drawn now and stands in the job's.

        Raises:
            InvalidParamsError: it does not fit the loaded model.
            EngineDeadError, ShuttingDownError, NotReadyError, QueueFullError.
        """
        # One that was accepted before is offered again and again until the engine takes it.
        with self._rejections_counted(is_on=not options.is_admitted):
            resolved = self._pipeline().prepare(params).params
            # Before a seed is drawn, which is another one when the request comes again.
            signature = hash((options.client, *params.summary().values()))
            if params.seed is None:
                params = dataclasses.replace(params, seed=resolved.seeds[0])
            job = Job(params, resolved, packing, request_id, options, signature)
            if not self._scheduler.admit(job):
                raise self._shutting_down()
        logger.debug("prompt: %s", params.prompt)
        return job

    def cancel(self, job: Job, reason: ServiceError) -> None:
        """A waiting job never runs; a running one stops at its next slice."""
        job.cancel(reason)
        if self._scheduler.remove(job):
            self._failed(job, reason)

    def status(self) -> EngineStatus:
        """How the engine stands; cheap, and never blocks on the device."""
        worker = self._worker
        state = str(worker.state)
        if self._is_draining and worker.state is not WorkerState.FAILED:
            state = "stopped" if worker.state is WorkerState.STOPPED else "draining"
        pipeline = worker.pipeline
        return EngineStatus(
            state=state,
            is_alive=worker.is_alive and not (worker.is_device_suspect or worker.is_stalled),
            is_ready=state == WorkerState.READY and worker.is_alive and not worker.is_stalled,
            startup=worker.startup,
            model=None if pipeline is None else pipeline.info.name,
            is_bundled=None if pipeline is None else pipeline.info.is_bundled,
            defaults=None if pipeline is None else _defaults_of(pipeline.info),
            device={} if pipeline is None else pipeline.runtime.describe(),
            queue_depth=self._scheduler.depth,
            running=len(self._scheduler.active),
        )

    def figures(self) -> EngineFigures:
        """What is measured about the engine at this moment."""
        pipeline = self._worker.pipeline
        return EngineFigures(
            in_flight=self._scheduler.in_flight,
            work_s=self._scheduler.work_s,
            shapes=len(self._shapes),
            memory_bytes={} if pipeline is None else pipeline.runtime.memory_bytes(),
            cache=None if pipeline is None else pipeline.conditioning_cache,
        )

    def drain(self) -> None:
        """Admit nothing more and answer what waits; jobs in flight go on."""
        self._is_draining = True
        self._worker.stop()
        for job in self._scheduler.close():
            self._failed(job, self._shutting_down())

    def hurry(self) -> None:
        """Cut the grace of a ``stop`` short."""
        self._hurry.set()

    def stop(self, grace_s: float = 0.0) -> bool:
        """Drain, let jobs in flight go on for ``grace_s``, then cancel them. Blocks.

        A second call only repeats what the first returned.

        Returns:
            False when the worker did not end, because one slice takes too long.
        """
        if self._has_ended is not None:
            return self._has_ended
        self.drain()
        deadline_s = time.monotonic() + grace_s
        while not self.is_idle and self._worker.is_alive and time.monotonic() < deadline_s:
            if self._hurry.wait(POLL_S):
                break
        in_flight = self._scheduler.active
        for job in in_flight:
            job.cancel(self._shutting_down())
        self._has_ended = self._worker.join(LAST_SLICE_S)
        # A job that is drawn is answered by the packers, ...
        self._packers.close()
        for job in in_flight:
            # ... any other by the worker, unless that is stuck in its slice.
            self._failed(job, self._shutting_down())
        return self._has_ended

    def _pipeline(self) -> Pipeline:
        """The pipeline, if jobs may be given to it."""
        worker = self._worker
        if worker.state is WorkerState.FAILED:
            raise EngineDeadError("the service cannot draw any more and must be restarted")
        if self._is_draining or worker.state is WorkerState.STOPPED:
            raise self._shutting_down()
        if worker.state is not WorkerState.READY or worker.pipeline is None:
            startup = worker.startup
            raise NotReadyError(
                f"the model is not ready yet ({startup.stage}, {startup.progress:.0%}); "
                "GET /ready says when it is",
                retry_after_s=LOADING_RETRY_S,
            )
        return worker.pipeline

    @contextmanager
    def _rejections_counted(self, *, is_on: bool = True) -> Iterator[None]:
        try:
            yield
        except ServiceError as error:
            if is_on:
                bound = error.bound if isinstance(error, QueueFullError) else error.code
                self.metrics.rejected(bound)
            raise

    def _shutting_down(self) -> ShuttingDownError:
        return ShuttingDownError(
            "the service is shutting down; try again when it is back",
            retry_after_s=self._grace_s,
        )

    def _drawn(self, job: Job, result: Result, times: FlightTimes) -> None:
        """The device is done with the job: pack its pictures while others run."""
        drawn_s = time.monotonic()
        if len(self._shapes) < MOST_SHAPES:
            references = tuple(fitted_size(picture) for picture in job.params.references)
            self._shapes.add((result.params.width, result.params.height, references))
        model = self._model_name()
        made = [
            (picture, provenance(job.params, result.params, seed, model))
            for picture, seed in zip(result.pictures, result.seeds, strict=True)
        ]

        def deliver(packed: list[Future[PackedPicture]]) -> None:
            token = telemetry.request_id.set(job.request_id)
            fields: Mapping[str, object] | None = None
            if job.last_preview is not None:
                # Begun before the pictures; watchers are to see it before the end.
                _log_failure(job.last_preview)
            broken = next((f.exception() for f in packed if f.exception() is not None), None)
            try:
                if broken is not None:
                    logger.error("packing failed", exc_info=broken)
                    self._failed(job, InternalError("the picture could not be written as a file"))
                else:
                    pictures = tuple(future.result() for future in packed)
                    timings_ms = _timings_ms(job, result, times, drawn_s)
                    fields = self._packed(job, result, pictures, timings_ms)
            except Exception:  # no job may go without an answer, or keep its place
                logger.exception("a drawn job could not be answered")
                self._failed(job, InternalError("the picture could not be handed over; try again"))
            finally:
                self._scheduler.packing(-1)
            if fields is not None:
                # Last, and not at once: writing it takes a while, and the thread that is to send
                # the answer would wait for the interpreter all the while.
                time.sleep(ANSWER_LEAD_S)
                self.metrics.count()
                telemetry.log_event(logger, logging.INFO, "job done", fields)
            telemetry.request_id.reset(token)

        self._scheduler.packing(+1)
        try:
            self._packers.pack(made, job.packing, deliver)
        except RuntimeError:  # the threads have ended
            self._scheduler.packing(-1)
            raise

    def _previewed(self, job: Job, preview: PreviewPicture) -> None:
        """Pack a preview while the next step runs."""
        seed = job.resolved.seeds[preview.image_index]
        made = provenance(job.params, job.resolved, seed, self._model_name())

        def deliver(packed: PackedPicture) -> None:
            job.events.emit(Preview(preview.image_index, preview.step, packed))
            self.metrics.previewed()

        job.last_preview = self._packers.pack_in_order(
            preview.picture, made, job.packing, deliver, previous=job.last_preview
        )

    def _packed(
        self,
        job: Job,
        result: Result,
        pictures: tuple[PackedPicture, ...],
        timings_ms: dict[str, float],
    ) -> Mapping[str, object] | None:
        """Answer the job. Returns what its line says; None when it had been answered before."""
        outcome = JobOutcome(
            model=self._model_name(),
            pictures=pictures,
            resolved=result.params,
            timings_ms=timings_ms,
            cache_hit=result.cache_hit,
            warnings=tuple(result.warnings),
            peak_bytes=result.peak_bytes,
            prompt_tokens=result.prompt_tokens,
        )

        def note() -> None:
            # Noted first, so that it is there when the client has its answer.
            self.metrics.completed(len(pictures), timings_ms)
            if job.trace.is_recorded:
                times = {f"fluxd.{name}_ms": ms for name, ms in timings_ms.items()}
                job.trace.ended("completed", {"fluxd.cache_hit": result.cache_hit, **times})

        if not job.complete(outcome, note):
            return None
        return {
            "size": f"{result.params.width}x{result.params.height}",
            "n": len(pictures),
            "steps": result.params.steps,
            "seed": result.seeds[0],
            "cache_hit": result.cache_hit,
            **{f"{name}_ms": ms for name, ms in timings_ms.items()},
            "peak_bytes": result.peak_bytes,
        }

    def _failed(self, job: Job, error: ServiceError) -> None:
        def note() -> None:
            # Not the message: it may quote the request.
            telemetry.log_event(
                logger,
                logging.INFO if error.status < 500 else logging.WARNING,
                "job failed",
                {"code": error.code, "param": error.param},
                job.request_id,
            )
            self.metrics.failed(error.code)
            job.trace.ended(error.code, {})

        job.fail(error, note)

    def _worker_ended(self) -> None:
        """Nothing may wait for a worker that is gone."""
        for job in [*self._scheduler.close(), *self._scheduler.active]:
            self._failed(job, EngineDeadError("the service cannot draw any more"))
        if self.has_failed and not self._worker.was_ready and self.on_startup_failure is not None:
            self.on_startup_failure()

    def _model_name(self) -> str:
        assert self._worker.pipeline is not None, "jobs run on a loaded pipeline"
        return self._worker.pipeline.info.name


def _defaults_of(model: Model) -> ModelDefaults:
    return ModelDefaults(model.default_side_px, model.default_steps, model.default_guidance)


def _timings_ms(job: Job, result: Result, times: FlightTimes, drawn_s: float) -> dict[str, float]:
    """What the job's time went to, now that its pictures, drawn at a moment, are packed."""
    assert job.started_s is not None, "a drawn job was started"
    now_s = time.monotonic()
    return {
        "queue": (job.started_s - job.accepted_s) * 1000,
        **{name: ms for name, ms in result.timings.items() if name != "total"},
        **({"previews": times.previews_s * 1000} if times.previews_s else {}),
        "paused": max(0.0, drawn_s - job.started_s - times.own_s) * 1000,
        "pack": (now_s - drawn_s) * 1000,
        "total": (now_s - job.accepted_s) * 1000,
    }


def _log_failure(preview: Future[None]) -> None:
    """Wait for a preview; one that could not be packed is no reason to withhold the picture."""
    broken = preview.exception()
    if broken is not None:
        logger.error("packing a preview failed", exc_info=broken)
