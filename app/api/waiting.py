"""From an accepted job to its outcome, while watching the client and the clock."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from starlette.requests import Request

from app.engine import Engine, Job, JobOutcome
from app.errors import ClientLeftError, JobTimeoutError

# When it is first looked whether the client is still there. Not at once: the worker's thread is
# about to begin with the job, and waits for the interpreter as long as this one has work.
WATCHED_AFTER_S = 0.005


async def outcome_of(request: Request, engine: Engine, job: Job, timeout_s: float) -> JobOutcome:
    """Wait for a job. The request's body must have been read.

    Raises:
        ClientLeftError: the client closed the connection; the job is cancelled.
        JobTimeoutError: it took too long; the job is cancelled.
        ServiceError: whatever the job failed with.
    """
    loop = asyncio.get_running_loop()
    news = asyncio.Event()

    def tell(_: Future[JobOutcome]) -> None:
        # The job may outlive whoever waits for it.
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.set)

    left: asyncio.Task[None] | None = None

    def watch_client() -> None:
        nonlocal left
        left = asyncio.create_task(_client_left(request))
        left.add_done_callback(lambda _: news.set())

    # Not wrapped as a future of the loop's and waited for: each hand-over costs the loop a round.
    job.future.add_done_callback(tell)
    timers = (loop.call_later(WATCHED_AFTER_S, watch_client), loop.call_later(timeout_s, news.set))
    try:
        await news.wait()
        if job.is_settled:
            return job.future.result()
        if left is not None and left.done():
            raise left_error()
        raise timeout_error(timeout_s)
    except (ClientLeftError, JobTimeoutError) as reason:
        if not job.is_settled:
            engine.cancel(job, reason)
        raise
    except asyncio.CancelledError:
        engine.cancel(job, ClientLeftError("the request was ended before the job was done"))
        raise
    finally:
        for timer in timers:
            timer.cancel()
        if left is not None:
            left.cancel()


def left_error() -> ClientLeftError:
    """Why a job ends that nobody waits for any more."""
    return ClientLeftError("the client closed the connection before the job was done")


def timeout_error(timeout_s: float) -> JobTimeoutError:
    """Why a job ends that took too long."""
    return JobTimeoutError(
        f"the job was not done after {timeout_s:g} s and has been cancelled; "
        "ask for a smaller size, fewer steps or fewer pictures"
    )


async def _client_left(request: Request) -> None:
    """Return once the connection is closed from the other side."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
