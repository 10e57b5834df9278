"""What is counted and measured, as Prometheus metrics: the only module that defines them.

Owns the names, labels and buckets. The engine and the routes feed it; what can be read
off the engine at any time is read when somebody looks (``app.api.metrics``). Labels
take values from short lists only: a client cannot make a new one.

What happens on the way of a request is only noted there, and counted later: by whoever has
the time, and at the latest when somebody looks. Prometheus' counting is Python of its own
with a lock for each figure, some twenty times a picture.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# From a tiny model's step to a large model's picture on a slow device, in seconds.
_WORK_BUCKETS_S = (
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0,
)  # fmt: skip
_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# Parts of a job's time that are the device's; the rest is waiting and packing.
DEVICE_STAGES = ("text", "references", "denoise", "decode", "previews")
# Values that are there from the start, at 0: an increase from nothing to 1 would not be seen.
OUTCOMES = (
    "completed", "cancelled", "client_left", "timeout", "out_of_memory", "internal_error",
    "device_fault", "shutting_down", "engine_dead",
)  # fmt: skip
REFUSALS = (
    "jobs", "pixels", "work", "loading", "shutting_down", "engine_dead", "invalid_api_key",
    "rate_limit_exceeded",
)  # fmt: skip


# Of what is noted no more than this waits to be counted.
MOST_NOTED = 1000


class _CountFirst(Collector):
    """Stands first in a registry: whoever looks sees all that has happened."""

    def __init__(self, count: Callable[[], None]) -> None:
        self._count = count

    def describe(self) -> list[Metric]:
        """Nothing of its own."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Nothing of its own."""
        self._count()
        return iter(())


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._noted: deque[Callable[[], None]] = deque()
        self._counting = threading.Lock()
        registry = self.registry = CollectorRegistry(auto_describe=False)
        registry.register(_CountFirst(self.count))
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self._jobs = Counter(
            "fluxd_jobs",
            "Jobs that were answered, by how: completed, or the error's code.",
            ["outcome"],
            registry=registry,
        )
        self._rejections = Counter(
            "fluxd_rejections",
            "Requests that were refused, by the queue's bound (jobs, pixels, work) or by the "
            "error's code: loading, invalid_api_key, rate_limit_exceeded and the like.",
            ["reason"],
            registry=registry,
        )
        self._disconnects = Counter(
            "fluxd_client_disconnects",
            "Jobs that ended because their client had left.",
            registry=registry,
        )
        self._queue_wait = Histogram(
            "fluxd_queue_wait_seconds",
            "From acceptance to the first slice, of jobs that began.",
            buckets=_WORK_BUCKETS_S,
            registry=registry,
        )
        self._job_time = Histogram(
            "fluxd_job_seconds",
            "From acceptance to the answer, of completed jobs.",
            buckets=_WORK_BUCKETS_S,
            registry=registry,
        )
        self._stage_time = Histogram(
            "fluxd_stage_seconds",
            "Time per completed job in each stage; paused is time in which other jobs ran.",
            ["stage"],
            buckets=_WORK_BUCKETS_S,
            registry=registry,
        )
        self._step_time = Histogram(
            "fluxd_step_seconds",
            "Time per Euler step.",
            buckets=_WORK_BUCKETS_S,
            registry=registry,
        )
        self._busy = Counter(
            "fluxd_device_busy_seconds",
            "Time in which the device worked for jobs.",
            registry=registry,
        )
        self._steps = Counter("fluxd_steps", "Euler steps that were run.", registry=registry)
        self._joint_steps = Counter(
            "fluxd_joint_steps",
            "Euler steps that were run together with those of other pictures.",
            registry=registry,
        )
        self._images = Counter("fluxd_images", "Pictures that were delivered.", registry=registry)
        self._previews = Counter(
            "fluxd_previews", "Previews that were delivered.", registry=registry
        )
        self._requests = Counter(
            "fluxd_http_requests",
            "Answers, by route and status; status 0: the client left before it came.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._request_time = Histogram(
            "fluxd_http_request_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=_WORK_BUCKETS_S,
            registry=registry,
        )
        self._loop_lag = Histogram(
            "fluxd_event_loop_lag_seconds",
            "How late a timer of the event loop comes: blocked, or while others had the cores.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        # Made once for each label: to look one up costs more than to count.
        self._stage_time_of = cache(self._stage_time.labels)
        self._request_time_of = cache(self._request_time.labels)
        self._requests_of = cache(self._requests.labels)
        for outcome in OUTCOMES:
            self._jobs.labels(outcome)
        for reason in REFUSALS:
            self._rejections.labels(reason)

    def count(self) -> None:
        """Count what is noted. Called from any thread that is in nobody's way."""
        with self._counting:
            while self._noted:
                self._noted.popleft()()

    def _note(self, happened: Callable[[], None]) -> None:
        self._noted.append(happened)
        if len(self._noted) > MOST_NOTED:
            self.count()

    def rejected(self, reason: str) -> None:
        """A request was refused: no place, no key, a page that may not ask, too much."""
        self._rejections.labels(reason).inc()

    def began(self, waited_s: float) -> None:
        """A job's first slice is about to run."""
        self._note(partial(self._queue_wait.observe, waited_s))

    def joined(self, steps: int) -> None:
        """A job took so many steps together with another's, or with one another."""
        self._joint_steps.inc(steps)

    def sliced(self, stage: str, took_s: float) -> None:
        """The device has run one slice."""
        self._note(partial(self._count_slice, stage, took_s))

    def _count_slice(self, stage: str, took_s: float) -> None:
        self._busy.inc(took_s)
        if stage == "denoise":
            self._steps.inc()
            self._step_time.observe(took_s)

    def previewed(self) -> None:
        """A preview was delivered."""
        self._previews.inc()

    def completed(self, pictures: int, timings_ms: Mapping[str, float]) -> None:
        """A job was answered with pictures."""
        self._note(partial(self._count_completed, pictures, timings_ms))

    def _count_completed(self, pictures: int, timings_ms: Mapping[str, float]) -> None:
        self._jobs.labels("completed").inc()
        self._images.inc(pictures)
        self._job_time.observe(timings_ms["total"] / 1000)
        for stage in (*DEVICE_STAGES, "paused", "pack"):
            if stage in timings_ms:
                self._stage_time_of(stage).observe(timings_ms[stage] / 1000)

    def failed(self, code: str) -> None:
        """A job was answered with an error."""
        self._jobs.labels(code).inc()
        if code == "client_left":
            self._disconnects.inc()

    def answered(self, method: str, route: str, status: int, took_s: float) -> None:
        """A request is over."""
        self._note(partial(self._count_answer, method, route, status, took_s))

    def _count_answer(self, method: str, route: str, status: int, took_s: float) -> None:
        self._requests_of(method, route, status).inc()
        self._request_time_of(route).observe(took_s)

    def lagged(self, late_s: float) -> None:
        """A timer of the event loop came so late."""
        self._loop_lag.observe(late_s)
