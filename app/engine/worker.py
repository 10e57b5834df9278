"""The one thread that owns the pipeline.

Owns loading, warming up and running the slices that the scheduler chooses, and
survives whatever a job does. Nothing else in the process touches the device. Knows
nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from app import telemetry
from app.engine.contract import Loader, LoadStep, Pipeline, Result
from app.engine.flight import Flight, FlightTimes, PreviewPicture
from app.engine.jobs import Job
from app.engine.scheduler import Scheduler
from app.errors import ServiceError, as_service_error
from app.metrics import Metrics
from fluxcore.errors import DeviceFaultError, FluxError, OutOfMemoryError

logger = logging.getLogger(__name__)

# A slice that takes so many times what it should is taken to be stuck, ...
STALL_FACTOR = 20.0
# ... but not before so many seconds (a shape that is new may be compiled first), ...
LEAST_STALL_S = 120.0
# ... and so many where nothing has been measured yet.
UNMEASURED_STALL_S = 900.0


class WorkerState(StrEnum):
    """Where the worker stands."""

    LOADING = "loading"
    WARMING_UP = "warming_up"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Startup:
    """How far getting ready has come; ``progress`` runs from 0 to 1 within a stage."""

    stage: str
    progress: float


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a job ends: with its pictures, or with a failure."""

    failure: ServiceError | None = None
    is_out_of_memory: bool = False
    is_fault: bool = False


class _InHand(NamedTuple):
    """The work that was begun last: of how many slices, and when."""

    job: Job
    slices: int
    began_s: float


class _StartupStoppedError(Exception):
    """Getting ready was given up because the process is ending."""


class Worker:
    """Runs on a thread of its own from ``start`` on.

    Args:
        load: makes the pipeline; called on the thread.
        warm_up_sizes: (width, height) of the pictures to draw before being ready; None
            for the model's default size.
        on_drawn: takes a finished job's result, still on the thread.
        on_preview: takes a preview, still on the thread.
        on_failed: takes a job that ended without one.
        on_end: called last, when no more jobs will be taken.
    """

    def __init__(
        self,
        load: Loader,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        warm_up_sizes: tuple[tuple[int, int], ...] | None,
        on_drawn: Callable[[Job, Result, FlightTimes], None],
        on_preview: Callable[[Job, PreviewPicture], None],
        on_failed: Callable[[Job, ServiceError], None],
        on_end: Callable[[], None],
    ) -> None:
        self._load = load
        self._scheduler = scheduler
        self._metrics = metrics
        self._warm_up_sizes = warm_up_sizes
        self._on_drawn = on_drawn
        self._on_preview = on_preview
        self._on_failed = on_failed
        self._on_end = on_end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fluxd-worker", daemon=True)
        self.pipeline: Pipeline | None = None
        self.state = WorkerState.LOADING
        self.startup = Startup("starting", 0.0)
        self.was_ready = False
        # The last job ended in a device fault, even after the pipeline's own retry.
        self.is_device_suspect = False
        self._warmed_s = 0.0
        self._flights: dict[Job, Flight] = {}
        # The one of these that was begun behind another's end, and has had no slice yet.
        self._ahead: Job | None = None
        self._in_hand: _InHand | None = None

    @property
    def _loaded(self) -> Pipeline:
        assert self.pipeline is not None, "jobs are served once the pipeline is loaded"
        return self.pipeline

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_stalled(self) -> bool:
        """Whether the slice in hand takes so long that it will hardly ever end."""
        in_hand = self._in_hand
        if in_hand is None:
            return False
        # Worked out for those who ask; most slices are over before anybody does.
        expected_s = self._scheduler.expected_s(in_hand.job)
        bound_s = UNMEASURED_STALL_S
        if expected_s is not None:
            bound_s = max(LEAST_STALL_S, STALL_FACTOR * in_hand.slices * expected_s)
        return time.monotonic() - in_hand.began_s > bound_s

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Give up getting ready, at the next tensor or warm-up picture."""
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end. False when it did not come in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        state = WorkerState.FAILED
        try:
            if self._get_ready():
                self._serve_all()
                state = WorkerState.STOPPED
            elif self._stopping.is_set():
                state = WorkerState.STOPPED
        finally:
            self.state = state
            self._on_end()

    def _get_ready(self) -> bool:
        """Load and warm up. False when that failed or was given up."""
        started_s = time.monotonic()
        try:
            self.pipeline = self._load(self._loading)
            loaded_s = time.monotonic()
            self.state = WorkerState.WARMING_UP
            self._warmed_s = loaded_s
            if self._warm_up_sizes is None:
                side_px = self.pipeline.info.default_side_px
                self._warm_up_sizes = ((side_px, side_px),)
            if self._warm_up_sizes:
                self.pipeline.warm_up(sizes=self._warm_up_sizes, progress=self._warming)
        except _StartupStoppedError:
            logger.info("stopped before the model was ready")
            return False
        except FluxError as error:
            logger.error("%s failed: %s", self.state.replace("_", " "), error)
            return False
        except Exception:
            logger.exception("%s failed", self.state.replace("_", " "))
            return False
        described = self.pipeline.runtime.describe()
        telemetry.log_event(
            logger,
            logging.INFO,
            "ready",
            {
                "model": self.pipeline.info.name,
                "load_s": loaded_s - started_s,
                "warm_up_s": time.monotonic() - loaded_s,
                **described,
            },
        )
        self.startup = Startup("ready", 1.0)
        self.state = WorkerState.READY
        self.was_ready = True
        return True

    def _loading(self, step: LoadStep) -> None:
        self.startup = Startup(step.component, step.done_bytes / max(step.total_bytes, 1))
        if self._stopping.is_set():
            raise _StartupStoppedError

    def _warming(self, done: int, wanted: int) -> None:
        self.startup = Startup("warm-up", done / max(wanted, 1))
        now_s = time.monotonic()
        if done:
            assert self._warm_up_sizes is not None, "settled before warming up"
            self._scheduler.calibrate(*self._warm_up_sizes[done - 1], now_s - self._warmed_s)
        self._warmed_s = now_s
        if self._stopping.is_set():
            raise _StartupStoppedError

    def _serve_all(self) -> None:
        while (turn := self._scheduler.take()) is not None:
            token = telemetry.request_id.set(turn.job.request_id)
            end = turn.end or turn.job.cancelled
            if turn.is_gone:
                self._close(turn.job)
            elif end is not None:
                self._end(turn.job, end)
            elif turn.trial is not None:
                self._try_joining(turn.job, turn.trial)
            else:
                self._advance(turn.job, turn.beside)
            telemetry.request_id.reset(token)
            # Nothing of a job may stay alive while the worker waits for the next.
            del turn, end

    def _end(self, job: Job, reason: ServiceError) -> None:
        """Abandon a job, whether it has begun or not."""
        self._close(job)
        if job in self._scheduler.active:
            self._scheduler.finished(job)
        self._on_failed(job, reason)

    def _close(self, job: Job) -> None:
        """Let go of a job's run, if it has one, and of all that it holds."""
        if job is self._ahead:
            self._ahead = None
        flight = self._flights.pop(job, None)
        if flight is None:
            return
        try:
            flight.close()
        except Exception:
            # Whatever a run does as it is abandoned, the next job must be served.
            logger.exception("a job that was given up failed as it was closed")

    def _advance(self, job: Job, beside: tuple[Job, ...]) -> None:
        """Run one slice of a job, or of several as one; answer those that end by it."""
        jobs, joint_s, joined = (job, *beside), 0.0, 1

        def begin_together() -> None:
            nonlocal joint_s, joined
            began_s = time.monotonic()
            if self._loaded.begin_together([self._flights[one].run for one in jobs]):
                joint_s, joined = time.monotonic() - began_s, len(jobs)
                # What the trial told no longer holds where memory was full.
                share = self._loaded.share(self._flights[job].run, joined)
                self._scheduler.learned(job, joined, share)

        if beside:
            ending = self._attempt(job, begin_together, slices=len(jobs))
            if ending is not None:
                for one in jobs:
                    self._settle(one, ending)
                return
        for one in jobs:
            token = telemetry.request_id.set(one.request_id)
            ending = self._attempt(one, partial(self._slice, one, joint_s, joined))
            if ending is not None:
                self._settle(one, ending)
            telemetry.request_id.reset(token)

    def _try_joining(self, job: Job, count: int) -> None:
        """Find out whether steps of so many jobs like this one are better taken as one."""

        def measure() -> None:
            self._scheduler.learned(job, count, self._flights[job].share(count))

        ending = self._attempt(job, measure)
        if ending is not None:
            self._settle(job, ending)

    def _slice(self, job: Job, joint_s: float, jobs: int) -> bool:
        """One slice of a job. Whether it was the last; its pictures are then on their way."""
        flight = self._flights.get(job) or self._begun(job)
        if job.started_s is None:
            self._metrics.began(job.start())
        if job is self._ahead:
            self._ahead = None
        previews = flight.advance(joint_s, jobs)
        for preview in previews:
            self._on_preview(job, preview)
        if flight.result is None:
            return False
        self._on_drawn(job, flight.result, flight.times)
        return True

    def _begun(self, job: Job) -> Flight:
        flight = Flight(job, self._loaded, self._scheduler, self._metrics)
        self._flights[job] = flight
        if self._loaded.begins_ahead:
            flight.run.meanwhile(partial(self._begin_after, job))
        return flight

    def _begin_after(self, job: Job) -> None:
        """Queue the first work of whichever job is next behind all of this one's.

        Trouble is that other job's: it meets it again where it begins in its turn.
        """
        following = self._scheduler.next_after(job)
        if following is None or following is self._ahead:
            return
        self._close_ahead()
        token = telemetry.request_id.set(following.request_id)
        try:
            self._begun(following).begin()
            self._ahead = following
        except Exception as error:
            logger.warning("not begun ahead of its turn: %s", error, exc_info=True)
        if self._ahead is None:
            self._close(following)
        telemetry.request_id.reset(token)

    def _close_ahead(self) -> None:
        """Let go of what was begun ahead; that job begins in its turn."""
        if self._ahead is not None:
            self._close(self._ahead)

    def _attempt(
        self, job: Job, work: Callable[[], bool | None], slices: int = 1
    ) -> _Ending | None:
        """Do work for a job. How the job ends by it; None where it goes on."""
        self._in_hand = _InHand(job, slices, time.monotonic())
        try:
            return _Ending() if work() else None
        except ServiceError as error:
            return _Ending(error.with_traceback(None))
        except OutOfMemoryError as error:
            logger.warning("out of memory: %s", error)
            return _Ending(as_service_error(error), is_out_of_memory=True)
        except DeviceFaultError as error:
            logger.error("device fault: %s", error)
            return _Ending(as_service_error(error), is_fault=True)
        except FluxError as error:
            return _Ending(as_service_error(error))
        except Exception as error:
            logger.exception("the job failed")
            return _Ending(as_service_error(error))
        finally:
            self._in_hand = None

    def _settle(self, job: Job, ending: _Ending) -> None:
        """The device is done with a job. Called where no traceback holds its tensors any more."""
        self._close(job)
        if ending.is_out_of_memory:
            self._close_ahead()
            self._loaded.runtime.release_memory()
        if ending.failure is None or ending.is_fault:
            self.is_device_suspect = ending.is_fault
        self._scheduler.finished(job)
        if ending.failure is not None:
            self._on_failed(job, ending.failure)
