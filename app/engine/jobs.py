"""One accepted request and what becomes of it.

Owns the job's state and the promise that exactly one answer is given. Knows
nothing of queues, threads or devices.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

from app.engine.contract import Resolved
from app.engine.packing import PackedPicture, Packing
from app.errors import ServiceError
from fluxcore.params import GenerationParams


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """A finished job.

    Attributes:
        timings_ms: queue, text, references, denoise, decode, pack and total.
        warnings: what the request asked for that had no effect, or was cut.
    """

    model: str
    pictures: tuple[PackedPicture, ...]
    resolved: Resolved
    timings_ms: dict[str, float]
    cache_hit: bool
    warnings: tuple[str, ...]
    peak_bytes: int


class Job:
    """One accepted request.

    Attributes:
        params: what to draw.
        packing: how to write the pictures.
        request_id: names the job in logs and answers.
        future: gets the outcome or a ``ServiceError``, once.
    """

    def __init__(self, params: GenerationParams, packing: Packing, request_id: str) -> None:
        self.params = params
        self.packing = packing
        self.request_id = request_id
        self.future: Future[JobOutcome] = Future()
        # From here on nobody but this job can settle it: a waiter that goes away
        # would otherwise cancel the future under the worker's hands.
        self.future.set_running_or_notify_cancel()
        self.state = JobState.QUEUED
        self.accepted_s = time.monotonic()
        self.started_s: float | None = None
        self._lock = threading.Lock()
        self._cancelled: ServiceError | None = None

    @property
    def cancelled(self) -> ServiceError | None:
        """Why the job must stop at its next slice, if it must."""
        return self._cancelled

    @property
    def is_settled(self) -> bool:
        """Whether it has been answered."""
        return self.future.done()

    def start(self) -> None:
        """The worker takes the job up."""
        self.state = JobState.RUNNING
        self.started_s = time.monotonic()

    def cancel(self, reason: ServiceError) -> None:
        """Ask a running job to stop; the first reason given stays."""
        with self._lock:
            self._cancelled = self._cancelled or reason

    def complete(self, outcome: JobOutcome) -> bool:
        """Answer with pictures. False when the job had been answered before."""
        with self._lock:
            if self.future.done():
                return False
            self.state = JobState.COMPLETED
            self.future.set_result(outcome)
        return True

    def fail(self, error: ServiceError) -> bool:
        """Answer with an error. False when the job had been answered before."""
        with self._lock:
            if self.future.done():
                return False
            self.state = JobState.FAILED
            self.future.set_exception(error)
        return True
