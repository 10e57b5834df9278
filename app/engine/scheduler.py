"""Which job runs next: a bounded queue, first in, first out.

Owns admission and the measured rate from which waiting clients are told when to
come back. Knows nothing of what a job does.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from app.engine.events import Queued
from app.engine.jobs import Job
from app.errors import QueueFullError

# What one job is taken to last before any has been measured, in seconds.
FIRST_GUESS_S = 5.0
# The weight of the newest job in the running mean.
NEWEST_WEIGHT = 0.3
# Clients do not honour longer waits (the OpenAI SDKs ignore more than 120 s).
LONGEST_WAIT_S = 120.0


class Scheduler:
    """Jobs that wait, and the one that runs.

    ``admit`` and ``remove`` are called from any thread, ``take`` and ``finished``
    from the worker's.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._mean_job_s: float | None = None
        # Clients that were refused and may come back, each for a slot of its own.
        self._refused = 0

    @property
    def depth(self) -> int:
        """Jobs that wait; the running one is not among them."""
        return len(self._waiting)

    @property
    def running(self) -> Job | None:
        """The job that the worker has in hand."""
        return self._running

    def check(self) -> None:
        """Refuse before a request's body is worked on.

        Raises:
            QueueFullError: with the time after which a slot should be free.
        """
        with self._changed:
            self._check()

    def admit(self, job: Job) -> bool:
        """Put a job at the end of the queue. False once the scheduler is closed.

        Raises:
            QueueFullError: with the time after which a slot should be free.
        """
        with self._changed:
            if not job.options.is_admitted:
                self._check()
            if self._closed:
                return False
            self._waiting.append(job)
            self._changed.notify()
        job.place = lambda: self._place(job)
        job.events.emit(self._place(job) or Queued(1, 0.0))
        return True

    def take(self) -> Job | None:
        """Wait for the next job; None once the scheduler is closed and empty."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return None
            taken = self._running = self._waiting.popleft()
            self._slot_freed()
        self._tell_places()
        return taken

    def finished(self, job: Job, *, is_measured: bool) -> None:
        """The worker is done with the job; ``is_measured`` if it ran to its end."""
        with self._changed:
            self._running = None
            if not is_measured or job.started_s is None:
                return
            took_s = time.monotonic() - job.started_s
            mean_s = took_s if self._mean_job_s is None else self._mean_job_s
            self._mean_job_s = mean_s + NEWEST_WEIGHT * (took_s - mean_s)

    def remove(self, job: Job) -> bool:
        """Take a waiting job out. False when it is not waiting (any more)."""
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            self._slot_freed()
        self._tell_places()
        return True

    def close(self) -> list[Job]:
        """Admit nothing more and hand back what waits; ``take`` ends after the running job."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def _place(self, job: Job) -> Queued | None:
        with self._changed:
            if job not in self._waiting:
                return None
            ahead = self._waiting.index(job)
            mean_s = self._mean_job_s
            return Queued(ahead + 1, None if mean_s is None else mean_s * (ahead + 1))

    def _tell_places(self) -> None:
        """Outside the lock: listeners may hold locks of their own."""
        with self._changed:
            watched = [job for job in self._waiting if job.events.is_watched]
        for job in watched:
            place = self._place(job)
            if place is not None:
                job.events.emit(place)

    def _check(self) -> None:
        if len(self._waiting) < self._limit:
            return
        self._refused += 1
        raise QueueFullError(
            f"the queue is full: {self._limit} jobs wait; try again later",
            retry_after_s=self._wait_s(),
        )

    def _wait_s(self) -> float:
        """When the slot should be free that the client refused last can take."""
        mean_s = FIRST_GUESS_S if self._mean_job_s is None else self._mean_job_s
        elapsed_s = 0.0
        if self._running is not None and self._running.started_s is not None:
            elapsed_s = time.monotonic() - self._running.started_s
        return min(max(mean_s * self._refused - elapsed_s, 1.0), LONGEST_WAIT_S)

    def _slot_freed(self) -> None:
        self._refused = max(0, self._refused - 1) if self._waiting else 0
