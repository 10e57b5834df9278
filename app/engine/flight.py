"""A job in flight: its suspended run, advanced slice by slice, and the time that took.

Used from the worker's thread only. Other jobs' slices may run between two of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from app.engine.contract import Pipeline, Result, Slice
from app.engine.events import StepDone
from app.engine.jobs import Job
from app.engine.previews import Previewer
from app.engine.scheduler import Scheduler
from app.metrics import Metrics
from fluxcore.drawn import DrawnPicture


class PreviewPicture(NamedTuple):
    """A preview that is to be packed."""

    image_index: int
    step: int
    picture: DrawnPicture


class FlightTimes:
    """What a job's own slices took, in seconds.

    Attributes:
        own_s: all of them, previews included.
        previews_s: the previews alone.
    """

    def __init__(self) -> None:
        self.own_s = 0.0
        self.previews_s = 0.0


class Flight:
    """One job from its first slice to its last.

    Attributes:
        run: its slices.
        result: the pictures, once they are drawn.
        times: what it took so far.
    """

    def __init__(
        self, job: Job, pipeline: Pipeline, scheduler: Scheduler, metrics: Metrics
    ) -> None:
        self._job = job
        self._scheduler = scheduler
        self._metrics = metrics
        self._pipeline = pipeline
        self.run = pipeline.run(job.params, alone=scheduler.is_alone)
        self._previewer = Previewer(job, pipeline)
        self.result: Result | None = None
        self.times = FlightTimes()
        # What ``begin`` took, which the first slice is charged with.
        self._begun_s = 0.0
        # The steps that each picture has come to.
        self._steps: dict[int, int] = {}

    def begin(self) -> None:
        """Queue the run's first work behind another job's. Raises what the pipeline does."""
        began_s = time.monotonic()
        self.run.begin()
        self._begun_s = time.monotonic() - began_s

    def share(self, count: int) -> float:
        """Time of a step of one of so many jobs like this one, taken as one, of its time alone.

        A trial that this takes is a part of the job's own time.
        """
        began_s = time.monotonic()
        try:
            return self._pipeline.share(self.run, count)
        finally:
            took_s = time.monotonic() - began_s
            self.times.own_s += took_s
            self._account("trial", "trial", took_s)

    def advance(self, joint_s: float = 0.0, jobs: int = 1) -> list[PreviewPicture]:
        """Run one slice, and the previews that are due after it. Raises what the pipeline does.

        Args:
            joint_s: what a step took that was just taken together with other jobs', and which
                this slice only shows.
            jobs: how many of them there were.
        """
        began_s = time.monotonic()
        self.times.own_s += joint_s
        shown: list[Slice] = []
        try:
            while not shown or shown[-1].has_more:
                shown.append(next(self.run))
        except StopIteration as end:
            self.result = end.value
        sliced_s = time.monotonic()
        self.times.own_s += sliced_s - began_s
        took_s = joint_s / jobs + sliced_s - began_s + self._begun_s
        self._begun_s = 0.0
        if len(shown) * jobs > 1:
            self._metrics.joined(len(shown))
        for done in shown:
            self._account(done.stage, done.stage, took_s / len(shown))
            if done.stage == "denoise":
                self._tell(done)
        return [preview for done in shown for preview in self._preview_after(done)]

    def _tell(self, done: Slice) -> None:
        # Between two steps the device waits. Whoever comes to watch later is told of its own.
        eta_s = self._job.eta_s() if self._job.events.is_watched else None
        self._steps[done.image_index] = done.step - self._job.resolved.start_step
        of_all = sum(self._steps.values())
        self._job.events.emit(StepDone(done.image_index, done.step, done.steps, of_all, eta_s))

    def _preview_after(self, done: Slice) -> Iterator[PreviewPicture]:
        began_s = time.monotonic()
        picture = self._previewer.picture_after(done)
        if picture is None:
            return
        took_s = time.monotonic() - began_s
        self.times.own_s += took_s
        self.times.previews_s += took_s
        self._account("decode", "preview", took_s)
        yield PreviewPicture(done.image_index, done.step, picture)

    def _account(self, stage: str, name: str, took_s: float) -> None:
        if stage != "trial":  # which is nobody's work
            self._scheduler.slice_done(self._job, stage, took_s)
        self._metrics.sliced(stage, took_s)
        self._job.trace.sliced(name, took_s)

    def close(self) -> None:
        """Abandon the run."""
        self.run.close()
