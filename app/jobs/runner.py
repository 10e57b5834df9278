"""Runs kept jobs: from the disk into the engine, and what comes of them back.

Owns one thread, which alone decides what is run next and which records what came
of it. A job is accepted once it is on the disk; from then on it is finished, once,
by this process or by a later one.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from app.engine import (
    Engine,
    Job,
    JobEvent,
    JobOptions,
    JobOutcome,
    Priority,
    Queued,
    Settled,
    Started,
)
from app.engine.events import Listener
from app.errors import (
    EngineDeadError,
    InternalError,
    JobCancelledError,
    JobTimeoutError,
    NotFoundError,
    NotReadyError,
    ServiceError,
    ShuttingDownError,
    StorageError,
    as_service_error,
)
from app.jobs.files import JobFiles
from app.jobs.live import LiveJob
from app.jobs.records import JobRecord, JobStatus, NewJob
from app.jobs.retention import Retention, SweepBudget
from app.jobs.store import RECORD_BYTES, Accepted, JobStore
from fluxcore.errors import FluxError
from fluxcore.params import GenerationParams

logger = logging.getLogger(__name__)

# How often the thread looks around by itself, in seconds.
TICK_S = 0.25
# How long after a failure of the disk the same is tried again, in seconds.
DISK_RETRY_S = 5.0
# A job that was being run so often when the process ended is not run again.
MOST_ATTEMPTS = 3

SHORTEST_DEADLINE_S = 0.001

Task = Callable[[], None]


class JobRunner:
    """See the module. ``accept``, ``cancel`` and ``close`` block; call them on a thread.

    Args:
        most_in_engine: kept jobs that the engine has at a time. The others wait on the
            disk, so that they hold no memory and leave room for requests that are waited for.
        on_end: called whenever a job's end is on the disk; must not block.
    """

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        files: JobFiles,
        retention: Retention,
        *,
        most_in_engine: int,
        on_end: Callable[[], None],
    ) -> None:
        self.store = store
        self.files = files
        self._engine = engine
        self._retention = retention
        self._most_in_engine = most_in_engine
        self._on_end = on_end
        self._live: dict[str, LiveJob] = {}
        self._in_engine: set[LiveJob] = set()
        # Those that the engine does not have, in the order to be run.
        self._waiting: list[LiveJob] = []
        self._late: list[tuple[float, Task]] = []
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fluxd-jobs", daemon=True)
        self._budget = SweepBudget(retention.most_bytes)
        self._is_closed = False

    @property
    def unfinished(self) -> int:
        """Accepted jobs that have not ended."""
        return len(self._live)

    @property
    def is_disk_failing(self) -> bool:
        """Whether something waits to be written, or a job was refused, because it could not be."""
        return bool(self._late)

    def start(self) -> None:
        """Take up what an earlier process left, then whatever is accepted. Blocks shortly."""
        unfinished = self.store.recover().result()
        waiting = {record.id for record in unfinished}
        self.files.sweep(waiting, self.store.ids().result() - waiting)
        for record in unfinished:
            live = self._live[record.id] = LiveJob(record)
            if record.attempts < MOST_ATTEMPTS:
                self._enqueue(live)
            else:
                self._failed(live, _crashed(record.attempts))
        if unfinished:
            logger.info("%d accepted jobs are taken up again", len(unfinished))
        self._thread.start()

    def close(self) -> None:
        """End once what has come back from the engine is recorded; the engine must have ended.

        Those who watch a job that is not finished are let go. A second call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()
        for live in list(self._live.values()):
            live.events.emit(Settled())

    def accept(self, new: NewJob, params: GenerationParams) -> Accepted:
        """Keep a request and run it some time; what it draws is settled now.

        Args:
            new: all but the request's pictures and how much they take.
            params: the request, with its seed and its pictures.

        Raises:
            IdempotencyError, QueueFullError: see ``JobStore.add``.
            StorageError: the disk does not take it.
        """
        assert params.seed is not None, "a job draws the same each time it is run"
        try:
            size = self.files.write_inputs(new.id, params.references, params.mask)
            accepted = self.store.add(dataclasses.replace(new, input_bytes=size)).result()
        except (OSError, sqlite3.Error) as error:
            self.files.remove_inputs(new.id)
            logger.error("a job cannot be kept: %s", error)
            self._inbox.put(self._probe)
            raise StorageError("the job cannot be kept: the disk does not take it") from None
        except ServiceError:
            self.files.remove_inputs(new.id)
            raise
        if accepted.is_repeat:
            self.files.remove_inputs(new.id)
        else:
            live = self._live[new.id] = LiveJob(accepted.record)
            self._inbox.put(partial(self._enqueue, live))
        return accepted

    def cancel(self, job_id: str) -> bool:
        """A job that waits never runs; one that runs stops at its next slice.

        Returns:
            False when it is final already.
        """
        if not self.store.cancel(job_id).result():
            return False
        live = self._live.get(job_id)
        if live is not None:
            self._inbox.put(partial(self._cancelled, live))
        return True

    def remove(self, job_id: str) -> bool:
        """Forget a job that is final, and its pictures. False when there is none such."""
        if not self.store.remove(job_id).result():
            return False
        self.files.remove_results(job_id)
        return True

    def current(self, job_id: str) -> list[JobEvent]:
        """The events that hold now of a job that is not finished."""
        live = self._live.get(job_id)
        return [] if live is None else live.current(self._place(live))

    def start_step(self, job_id: str) -> int:
        """The steps that each of a job's pictures begins after, once the engine has the job."""
        live = self._live.get(job_id)
        return 0 if live is None or live.job is None else live.job.resolved.start_step

    def watch(self, job_id: str, listener: Listener) -> Callable[[], None]:
        """Tell ``listener`` how a job stands and then what becomes of it.

        ``Settled`` says that the record has news: the end, or that the process is ending.

        Returns:
            A function that ends the watching.
        """
        live = self._live.get(job_id)
        if live is None:
            listener(Settled())
            return lambda: None
        return live.events.watch(listener, self._place(live))

    # --- everything below runs on the thread, which alone changes what waits ---

    def _run(self) -> None:
        next_tick_s = 0.0
        while True:
            with suppress(queue.Empty):
                task = self._inbox.get(timeout=TICK_S)
                if task is None:
                    return
                self._do(task)
            if time.monotonic() >= next_tick_s:
                next_tick_s = time.monotonic() + TICK_S
                self._do(self._tick)
            self._do(self._feed)

    def _do(self, task: Task) -> None:
        """Run a task; one that the disk or the database refuses is run again later.

        What is asked for again and again waits there once, however long the disk fails.
        """
        if any(task == late for _, late in self._late):
            return
        try:
            task()
        except (OSError, sqlite3.Error) as error:
            logger.error("the data directory cannot be written to: %s", error)
            self._late.append((time.monotonic() + DISK_RETRY_S, task))
        except Exception:
            logger.exception("keeping a job failed")

    def _probe(self) -> None:
        """Try whether the disk takes data again; put off like whatever it does not take."""
        self.store.probe().result()
        self.files.probe()

    def _tick(self) -> None:
        now_s = time.monotonic()
        due = [task for at_s, task in self._late if at_s <= now_s]
        self._late = [(at_s, task) for at_s, task in self._late if at_s > now_s]
        for task in due:
            self._do(task)
        for live in [live for live in self._waiting if _is_over(live)]:
            self._waiting.remove(live)
            self._do(partial(self._failed, live, _timeout()))
        if self._budget.is_spent():
            self._do(self._remove_outlived)

    def _enqueue(self, live: LiveJob) -> None:
        # It may have been cancelled before the thread came to it.
        if live.id in self._live:
            index = bisect.bisect(self._waiting, live.order, key=_order)
            self._waiting.insert(index, live)
            self._tell_places(index + 1)

    def _feed(self) -> None:
        """Give the engine what it may have."""
        while self._waiting and self._engine.status().is_ready:
            following = self._waiting[0]
            # What was running when a process ended may have ended it: it runs alone.
            alone = following.is_suspect or any(live.is_suspect for live in self._in_engine)
            if len(self._in_engine) >= (1 if alone else self._most_in_engine):
                return
            if not self._submit(following):
                return
            self._waiting.pop(0)
            self._tell_places(0)

    def _submit(self, live: LiveJob) -> bool:
        """Hand one job to the engine. False when it takes none now."""
        try:
            record = self.store.get(live.id).result()
        except NotFoundError:
            # Cancelled and forgotten while it waited; the thread is about to be told.
            return True
        request = record.request
        options = JobOptions(
            previews=request.previews,
            priority=Priority(record.priority),
            deadline_s=_left_s(record),
            client=record.client,
            is_admitted=True,
        )
        try:
            references, mask = self.files.read_inputs(
                live.id, request.references, has_mask=request.has_mask
            )
            params = request.generation(references, mask)
            job = self._engine.submit(params, request.packing(), record.request_id, options)
        except (NotReadyError, ShuttingDownError, EngineDeadError):
            return False
        except OSError:
            logger.exception("the pictures of a job cannot be read")
            self._do(partial(self._failed, live, InternalError("the job's pictures were lost")))
        except (ServiceError, FluxError) as error:
            self._do(partial(self._failed, live, as_service_error(error)))
        else:
            live.job = job
            self._in_engine.add(live)
            job.watch(partial(self._hear, live, job))
        return True

    def _hear(self, live: LiveJob, job: Job, event: JobEvent) -> None:
        """On the engine's threads: pass an event on without waiting for anything."""
        live.hear(event)
        if isinstance(event, Started):
            self._inbox.put(partial(self._started, live))
        elif isinstance(event, Settled):
            self._inbox.put(partial(self._settled, live, job))

    def _started(self, live: LiveJob) -> None:
        self.store.start(live.id).result()

    def _settled(self, live: LiveJob, job: Job) -> None:
        """The engine is done with a job: put on the disk what came of it."""
        if live.id not in self._live:
            return
        try:
            outcome = job.future.result()
        except ShuttingDownError:
            self.store.requeue(live.id).result()
        except EngineDeadError:
            logger.warning("%s waits for the next start of the service", live.id)
        except ServiceError as error:
            self._failed(live, error)
        else:
            self._completed(live, outcome)

    def _completed(self, live: LiveJob, outcome: JobOutcome) -> None:
        self.files.write_results(live.id, outcome.pictures)
        if not self.store.complete(live.id, outcome).result() and not self._is_completed(live.id):
            # Cancelled in the last moment.
            self.files.remove_results(live.id)
        self._end(live, sum(len(picture.data) for picture in outcome.pictures))

    def _is_completed(self, job_id: str) -> bool:
        """Whether this was recorded by an earlier try of the same."""
        try:
            return self.store.get(job_id).result().status is JobStatus.COMPLETED
        except NotFoundError:
            return False

    def _failed(self, live: LiveJob, error: ServiceError) -> None:
        self.store.fail(live.id, error).result()
        self._end(live)

    def _cancelled(self, live: LiveJob) -> None:
        if live in self._waiting:
            self._waiting.remove(live)
        if live.job is not None:
            self._engine.cancel(live.job, JobCancelledError("the job was cancelled"))
        self._end(live)

    def _end(self, live: LiveJob, picture_bytes: int = 0) -> None:
        """The job's status is final and on the disk."""
        self.files.remove_inputs(live.id)
        self._live.pop(live.id, None)
        self._in_engine.discard(live)
        live.events.emit(Settled())
        self._on_end()
        if self._budget.is_spent(picture_bytes + RECORD_BYTES):
            self._inbox.put(self._remove_outlived)

    def _remove_outlived(self) -> None:
        retention = self._retention
        for job_id in self.store.outlived(retention.seconds, retention.most_bytes).result():
            self.remove(job_id)

    def _place(self, live: LiveJob) -> Queued | None:
        """Of a job that the engine does not have yet. Called from any thread."""
        if live.job is not None:
            return None
        ahead = bisect.bisect_left(list(self._waiting), live.order, key=_order)
        return Queued(self._engine.status().queue_depth + ahead + 1, None)

    def _tell_places(self, first: int) -> None:
        """Of those from index ``first`` on, who have moved."""
        depth = self._engine.status().queue_depth
        for index in range(first, len(self._waiting)):
            live = self._waiting[index]
            if live.events.is_watched:
                live.events.emit(Queued(depth + index + 1, None))


def _order(live: LiveJob) -> tuple[int, int]:
    return live.order


def _left_s(record: JobRecord) -> float | None:
    """What is left until the deadline; never nothing, so that the engine answers for it."""
    if record.deadline_s is None:
        return None
    return max(record.deadline_s - time.time(), SHORTEST_DEADLINE_S)


def _is_over(live: LiveJob) -> bool:
    return live.deadline_s is not None and live.deadline_s <= time.time()


def _timeout() -> JobTimeoutError:
    return JobTimeoutError("the job was not begun before its deadline; give it more time")


def _crashed(attempts: int) -> InternalError:
    return InternalError(
        f"the service ended {attempts} times while it ran this job, which is not run again",
        code="crashed",
    )
