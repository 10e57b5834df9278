"""One accepted request and what becomes of it.

Owns the job's state and the promise that exactly one answer is given. Knows
nothing of queues, threads or devices.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from app.engine.contract import Resolved
from app.engine.events import EventLog, Listener, Queued, Settled, Started
from app.engine.packing import PackedPicture, Packing
from app.errors import ServiceError
from app.tracing import JobTrace
from fluxcore.params import GenerationParams

logger = logging.getLogger(__name__)


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class Priority(StrEnum):
    """How a job stands to others; within a class the shortest goes first."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a job is to be treated; what it draws does not depend on it.

    Attributes:
        previews: pictures of what is coming to be made while denoising, per image at most.
        priority: the class it waits in.
        deadline_s: after so many seconds from its acceptance the job is cancelled.
        client: who asked, so that no client takes the whole service.
        is_admitted: it was accepted before, and is not refused for a full queue now.
    """

    previews: int = 0
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    client: str = "local"
    is_admitted: bool = False


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """A finished job.

    Attributes:
        timings_ms: queue, text, references, denoise, decode, pack and total.
        warnings: what the request asked for that had no effect, or was cut.
        prompt_tokens: tokens of the prompt that the model read, without padding.
    """

    model: str
    pictures: tuple[PackedPicture, ...]
    resolved: Resolved
    timings_ms: dict[str, float]
    cache_hit: bool
    warnings: tuple[str, ...]
    peak_bytes: int
    prompt_tokens: int


DEFAULT_OPTIONS = JobOptions()


class Outlook(Protocol):
    """Who knows a job's place among all others; see ``Job.place`` and ``Job.eta_s``."""

    def place(self, job: Job) -> Queued | None: ...
    def eta_s(self, job: Job) -> float | None: ...


class Job:
    """One accepted request.

    Attributes:
        params: what to draw; the seed stands in it, so that the job can be run again.
        resolved: the same with every default of the model filled in.
        packing: how to write the pictures.
        request_id: names the job in logs and answers.
        options: how to treat it.
        signature: the same for a request that the same client sends again.
        future: gets the outcome or a ``ServiceError``, once.
        events: what becomes of it, for those who watch.
    """

    def __init__(
        self,
        params: GenerationParams,
        resolved: Resolved,
        packing: Packing,
        request_id: str,
        options: JobOptions = DEFAULT_OPTIONS,
        signature: int | None = None,
    ) -> None:
        # Made on the request's thread, so that it belongs to the request's trace.
        self.trace = JobTrace(
            {
                "fluxd.request_id": request_id,
                "fluxd.width": resolved.width,
                "fluxd.height": resolved.height,
                "fluxd.steps": resolved.steps,
                "fluxd.images": len(resolved.seeds),
                "fluxd.references": len(params.references),
                "fluxd.priority": str(options.priority),
            }
        )
        self.params = params
        self.resolved = resolved
        self.packing = packing
        self.request_id = request_id
        self.options = options
        self.signature = signature
        self.events = EventLog()
        # The preview that is being packed, or was last.
        self.last_preview: Future[None] | None = None
        # The scheduler's, once it has the job. It is asked about a job and knows none by itself:
        # what held this one would keep it, and its pictures, until garbage is looked for.
        self.outlook: Outlook | None = None
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

    def place(self) -> Queued | None:
        """Its present place, while it waits."""
        return None if self.outlook is None else self.outlook.place(self)

    def eta_s(self) -> float | None:
        """When it should be done, in seconds from now; None unless it is in flight."""
        return None if self.outlook is None else self.outlook.eta_s(self)

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Tell ``listener`` how the job stands and then what becomes of it.

        It is called from the engine's threads, one event at a time, and must not block.

        Returns:
            A function that ends the watching.
        """
        return self.events.watch(listener, self.place(), self.eta_s())

    def start(self) -> float:
        """The worker takes the job up. Returns how long it waited, in seconds."""
        self.state = JobState.RUNNING
        self.started_s = time.monotonic()
        self.events.emit(Started())
        return self.started_s - self.accepted_s

    def cancel(self, reason: ServiceError) -> None:
        """Ask a running job to stop; the first reason given stays."""
        with self._lock:
            self._cancelled = self._cancelled or reason

    def complete(self, outcome: JobOutcome, note: Callable[[], None] | None = None) -> bool:
        """Answer with pictures, after ``note``. False when the job had been answered before."""
        with self._lock:
            if self.future.done():
                return False
            _try_note(note)
            self.state = JobState.COMPLETED
            self.future.set_result(outcome)
        self.events.emit(Settled())
        return True

    def fail(self, error: ServiceError, note: Callable[[], None] | None = None) -> bool:
        """Answer with an error, after ``note``. False when the job had been answered before."""
        with self._lock:
            if self.future.done():
                return False
            _try_note(note)
            self.state = JobState.FAILED
            self.future.set_exception(error)
        self.events.emit(Settled())
        return True


def _try_note(note: Callable[[], None] | None) -> None:
    """Call ``note``, if there is one. What it raises is logged, and the job is answered."""
    try:
        if note is not None:
            note()
    except Exception:  # no job may go without an answer
        logger.exception("what became of a job could not be noted")
