"""A job in flight: its suspended run, advanced slice by slice, and the time that took.

Used from the worker's thread only. Other jobs' slices may run between two of its own.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from PIL import Image

from app.engine.contract import Pipeline, Result
from app.engine.events import StepDone
from app.engine.jobs import Job
from app.engine.previews import Previewer
from app.engine.scheduler import Scheduler
from app.metrics import Metrics


class PreviewPicture(NamedTuple):
    """A preview that is to be packed."""

    image_index: int
    step: int
    picture: Image.Image


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
        result: the pictures, once they are drawn.
        times: what it took so far.
    """

    def __init__(
        self, job: Job, pipeline: Pipeline, scheduler: Scheduler, metrics: Metrics
    ) -> None:
        self._job = job
        self._scheduler = scheduler
        self._metrics = metrics
        self._slices = pipeline.run(job.params)
        self._previewer = Previewer(job, pipeline)
        self.result: Result | None = None
        self.times = FlightTimes()

    def advance(self) -> PreviewPicture | None:
        """Run one slice, and the preview that is due after it. Raises what the pipeline does."""
        began_s = time.monotonic()
        try:
            done = next(self._slices)
        except StopIteration as end:
            self.times.own_s += time.monotonic() - began_s
            self.result = end.value
            return None
        sliced_s = time.monotonic()
        self.times.own_s += sliced_s - began_s
        self._account(done.stage, done.stage, sliced_s - began_s)
        if done.stage == "denoise":
            # Between two steps the device waits. Whoever comes to watch later is told of its own.
            eta_s = self._job.eta_s() if self._job.events.is_watched else None
            self._job.events.emit(StepDone(done.image_index, done.step, done.steps, eta_s))
        picture = self._previewer.picture_after(done)
        if picture is None:
            return None
        took_s = time.monotonic() - sliced_s
        self.times.own_s += took_s
        self.times.previews_s += took_s
        self._account("decode", "preview", took_s)
        return PreviewPicture(done.image_index, done.step, picture)

    def _account(self, stage: str, name: str, took_s: float) -> None:
        self._scheduler.slice_done(self._job, stage, took_s)
        self._metrics.sliced(stage, took_s)
        self._job.trace.sliced(name, took_s)

    def close(self) -> None:
        """Abandon the run."""
        self._slices.close()
