"""A device to try the scheduler on: a clock of its own, and slices of known cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from app.engine.admission import Limits
from app.engine.jobs import Job, JobOptions
from app.engine.joining import COUNTS
from app.engine.packing import Packing
from app.engine.scheduler import Scheduler, Turn
from app.errors import QueueFullError, ServiceError
from fluxcore.params import GenerationParams
from tests.service.fake_pipeline import FakePipeline, FakeSlice, slices_of

# What a step, a text and a picture cost on the simulated device.
STEP_S = {256: 0.25, 512: 1.0, 1024: 5.0}
TEXT_S = 0.05
DECODE_S = {256: 0.05, 512: 0.2, 1024: 1.0}


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make(name: str = "x", side: int = 256, steps: int = 4, n: int = 1, **options: object) -> Job:
    params = GenerationParams(prompt=name, width=side, height=side, steps=steps, n=n, seed=0)
    resolved = FakePipeline().prepare(params).params
    return Job(params, resolved, Packing(), name, JobOptions(**options))  # type: ignore[arg-type]


def cost_s(job: Job, done: FakeSlice) -> float:
    side = job.resolved.width
    return {"text": TEXT_S, "denoise": STEP_S[side], "decode": DECODE_S[side]}[done.stage]


def work_s(job: Job) -> float:
    return sum(cost_s(job, done) for done in slices_of(job.resolved))


@dataclass
class Device:
    """Plays the worker on the scheduler: one slice at a time, the clock moving on."""

    scheduler: Scheduler
    clock: Clock
    noise: Callable[[], float] = lambda: 1.0
    fails: Callable[[Job], bool] = lambda job: False
    # What a step takes as one of so many, of one alone; how long it takes to find out.
    shares: dict[int, float] = field(default_factory=dict)
    trial_s: float = 0.5
    trials: int = 0
    joint: list[tuple[Job, ...]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    ended: dict[Job, tuple[str, float]] = field(default_factory=dict)
    begun: dict[Job, float] = field(default_factory=dict)
    _left: dict[Job, list[FakeSlice]] = field(default_factory=dict)

    def step(self) -> bool:
        """One turn. False when there is nothing to do."""
        turn = self.scheduler.poll()
        if turn is None:
            return False
        self.take(turn)
        return True

    def take(self, turn: Turn) -> None:
        job = turn.job
        assert job not in self.ended, "a job is served after its end"
        end = turn.end or job.cancelled
        if end is not None:
            self._end(job, end.code)
            return
        if turn.trial is not None:
            self._try(job, turn.trial)
            return
        jobs = (job, *turn.beside)
        if turn.beside:
            self._check_alike(jobs)
            self.joint.append(jobs)
        share = self.shares.get(len(jobs), 1.0) if turn.beside else 1.0
        slices = [self._advance(one, share) for one in jobs]
        # All end together, and each is then told to the scheduler.
        self.clock.now_s += sum(took_s for _, took_s in slices)
        for one, (done, took_s) in zip(jobs, slices, strict=True):
            self._told(one, done, took_s)

    def _check_alike(self, jobs: tuple[Job, ...]) -> None:
        assert len(jobs) in COUNTS and len(set(jobs)) == len(jobs)
        assert len({len(self._left[one]) for one in jobs}) == 1, "at different steps"
        assert {self._left[one][0].stage for one in jobs} == {"denoise"}
        assert len({one.resolved.width for one in jobs}) == 1
        assert len({one.options.priority for one in jobs}) == 1
        for one in jobs:
            assert one not in self.ended and one in self.scheduler.active

    def _try(self, job: Job, count: int) -> None:
        self.trials += 1
        self.clock.now_s += self.trial_s
        self.scheduler.learned(job, count, self.shares.get(count, 1.0))

    def _advance(self, job: Job, share: float) -> tuple[FakeSlice, float]:
        if job not in self._left:
            self._left[job] = list(slices_of(job.resolved))
            self.begun[job] = self.clock.now_s
        done = self._left[job].pop(0)
        return done, cost_s(job, done) * self.noise() * share

    def _told(self, job: Job, done: FakeSlice, took_s: float) -> None:
        self.trace.append(job.request_id)
        if self.fails(job):
            self._end(job, "failed")
            return
        self.scheduler.slice_done(job, done.stage, took_s)
        if not self._left[job]:
            self._end(job, "completed")

    def run(self) -> None:
        while self.step():
            pass

    def _end(self, job: Job, how: str) -> None:
        assert job not in self.ended, "a job ends twice"
        self.ended[job] = (how, self.clock.now_s)
        if job in self.scheduler.active:
            self.scheduler.finished(job)


def device(
    limits: Limits | None = None,
    *,
    is_measured: bool = True,
    shares: dict[int, float] | None = None,
) -> Device:
    clock = Clock()
    # The one below runs first and is forgotten, so that all costs are known.
    limits = limits or Limits(jobs=1000, work_s=1e6)
    scheduler = Scheduler(limits, clock, joins=shares is not None)
    made = Device(scheduler, clock, shares=shares or {})
    if is_measured:
        for side in STEP_S:
            made.scheduler.admit(make("measured", side))
            made.run()
        made.trace.clear()
        made.ended.clear()
    return made


def refused(made: Device, job: Job) -> QueueFullError:
    with pytest.raises(QueueFullError) as caught:
        made.scheduler.admit(job)
    return caught.value


def wait_s(error: ServiceError) -> float:
    assert int(error.headers["Retry-After"]) >= 1
    return float(error.headers["retry-after-ms"]) / 1000
