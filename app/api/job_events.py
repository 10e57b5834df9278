"""A job's events as they happen, from the engine's threads to a stream of one client.

Owns the way between the threads, the job's time limit and its cancelling when nobody
reads. What an event looks like is the narrator's business.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Protocol

import anyio.to_thread

from app.api.waiting import left_error, timeout_error
from app.engine import (
    Engine,
    Job,
    JobEvent,
    JobOutcome,
    Preview,
    Queued,
    Settled,
    Started,
    StepDone,
)
from app.engine.events import Listener
from app.errors import ServiceError, as_service_error

# Events of one kind that are kept for a reader who falls behind. Previews may be large.
UNREAD: dict[type[JobEvent], int] = {Queued: 1, Started: 1, StepDone: 1, Preview: 4, Settled: 1}


class Narrator(Protocol):
    """Writes events in one route's language, in their form on the wire."""

    def progress(self, event: JobEvent) -> bytes:
        """Of anything but the end; nothing if the route does not tell it. Slow for previews."""

    def completed(self, outcome: JobOutcome) -> Iterable[bytes]:
        """Of the end. Slow: it is called off the event loop."""

    def failed(self, error: ServiceError) -> bytes:
        """Of an end without pictures."""


class JobWatch:
    """What becomes of a job, awaited one event at a time.

    A reader that falls behind misses old places, steps and previews, never the end: a
    client that does not read holds a few previews at most.
    """

    def __init__(self, watch: Callable[[Listener], Callable[[], None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[JobEvent] = deque()
        self._news = asyncio.Event()
        self._stop = watch(self._hear)

    async def next(self) -> JobEvent:
        """The next event; must not be called after ``Settled``."""
        while not self._events:
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def close(self) -> None:
        """Watch no longer."""
        self._stop()

    def _hear(self, event: JobEvent) -> None:
        self._loop.call_soon_threadsafe(self._keep, event)

    def _keep(self, event: JobEvent) -> None:
        unread = [kept for kept in self._events if _kind(kept) == _kind(event)]
        surplus = len(unread) + 1 - UNREAD[type(event)]
        for old in unread[: max(0, surplus)]:
            self._events.remove(old)
        self._events.append(event)
        self._news.set()


async def job_events(
    engine: Engine, job: Job, narrator: Narrator, timeout_s: float
) -> AsyncGenerator[bytes, None]:
    """The job's events until it has ended; closing the generator cancels the job."""
    end_s = asyncio.get_running_loop().time() + timeout_s
    watch = JobWatch(job.watch)
    reason: ServiceError = left_error()
    try:
        while True:
            try:
                async with asyncio.timeout_at(end_s):
                    event = await watch.next()
            except TimeoutError:
                reason = timeout_error(timeout_s)
                yield narrator.failed(reason)
                return
            if isinstance(event, Settled):
                break
            if isinstance(event, Preview):
                chunk = await anyio.to_thread.run_sync(narrator.progress, event)
            else:
                chunk = narrator.progress(event)
            if chunk:
                yield chunk
        error = job.future.exception()
        if error is None:
            outcome = job.future.result()
            for chunk in await anyio.to_thread.run_sync(lambda: list(narrator.completed(outcome))):
                yield chunk
        elif isinstance(error, Exception):
            yield narrator.failed(as_service_error(error))
    finally:
        watch.close()
        if not job.is_settled:
            engine.cancel(job, reason)


def _kind(event: JobEvent) -> tuple[object, ...]:
    """Of events of one kind that nobody has read yet, the oldest may go."""
    return (StepDone, event.image_index) if isinstance(event, StepDone) else (type(event),)
