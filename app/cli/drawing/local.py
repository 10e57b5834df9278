"""An artist in this process: the service's own engine, without HTTP.

The engine's one thread owns the device; this side only waits, so that Ctrl-C is
heard at once whatever the device is doing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from queue import SimpleQueue

from app.cli.console import EXIT_FAILURE, EXIT_INTERRUPTED, bytes_note, duration, say
from app.cli.drawing.contract import DrawingError, Drawn, Order, Watcher, step_note
from app.cli.startup import stage_of
from app.engine import (
    Engine,
    Job,
    JobEvent,
    JobOptions,
    JobOutcome,
    LoadStep,
    Pipeline,
    Preview,
    Queued,
    Settled,
    Started,
    StepDone,
)
from app.errors import JobCancelledError
from app.main import BUNDLED_NOTE, pipeline_loader
from app.settings import Settings

POLL_S = 0.05
# Of a stage before that, nothing can be said about how long it takes.
LEAST_SHARE = 0.02


class LocalArtist:
    """Loads the model of the settings, on another thread, from the start on.

    Args:
        is_warmed: draw a first picture at once, so that the next are fast; for whoever
            will ask for several.
    """

    def __init__(self, settings: Settings, *, is_warmed: bool) -> None:
        if not is_warmed:
            # Both pay off over many pictures only.
            settings = settings.model_copy(update={"compile": "off", "cuda_graphs": 0})
        self._load = pipeline_loader(settings.model, settings)
        self._is_bundled = settings.model is None
        self._failure: Exception | None = None
        self._loading: LoadStep | None = None
        self._components: list[str] = []
        self._began_s = time.monotonic()
        self._part_began_s = self._began_s
        self.load_ms: float | None = None
        # What goes wrong before the model is ready is raised here, and need not be logged.
        self._log = logging.getLogger("app.engine.worker")
        self._log.setLevel(logging.CRITICAL)
        self._engine = Engine(self._loaded, warm_up_sizes=None if is_warmed else ())
        self._engine.start()

    @property
    def name(self) -> str:
        """The model and the device."""
        status = self._engine.status()
        if status.model is None:
            return "no model yet"
        return f"{status.model} on {status.device.get('device', 'an unknown device')}"

    @property
    def note(self) -> str | None:
        """That the bundled model draws shapes, where it is the one."""
        return BUNDLED_NOTE if self._is_bundled else None

    @property
    def standing(self) -> str | None:
        """See ``Artist``."""
        told = self._told()
        if told is None:
            return None
        stage, share, note = told
        words = f"{stage} {note}".rstrip()
        if share is None or share < LEAST_SHARE:
            return words
        left_s = (time.monotonic() - self._part_began_s) * (1 - share) / share
        return f"{words}, {duration(left_s)} left"

    def make_ready(self, watcher: Watcher) -> None:
        """See ``Artist``."""
        shown = 0
        while True:
            told = self._told()
            # None is left out, however fast it was.
            for component in self._components[shown:]:
                watcher.show(f"loading {component}", 0.0)
                shown += 1
            if told is None:
                break
            stage, share, note = told
            watcher.show(stage, share, note=note)
            time.sleep(POLL_S)
        self._log.setLevel(logging.NOTSET)

    def draw(self, order: Order, watcher: Watcher) -> Drawn:
        """See ``Artist``."""
        self.make_ready(watcher)
        job = self._engine.submit(
            order.params, order.packing, "fluxd", JobOptions(previews=order.previews)
        )
        news: SimpleQueue[JobEvent] = SimpleQueue()
        stop_watching = job.watch(news.put)
        try:
            outcome = self._watched(job, news, watcher)
        finally:
            stop_watching()
            if not job.is_settled:
                self._engine.cancel(job, JobCancelledError("cancelled"))
        return Drawn(outcome.pictures, outcome.timings_ms, outcome.warnings)

    def close(self) -> None:
        """End the engine; the process too where the device does not come back."""
        has_ended = self._engine.stop()
        self._log.setLevel(logging.NOTSET)
        if not has_ended:
            _leave(EXIT_FAILURE)

    def abandon(self) -> None:
        """End the process, whatever the device is doing."""
        say("fluxd: interrupted")
        _leave(EXIT_INTERRUPTED)

    def _watched(self, job: Job, news: SimpleQueue[JobEvent], watcher: Watcher) -> JobOutcome:
        pictures = len(job.resolved.seeds)
        wanted = pictures * (job.resolved.steps - job.resolved.start_step)
        while True:
            match event := news.get():
                case Queued():
                    watcher.show("waiting for the job before")
                case Started():
                    watcher.show("reading the prompt")
                case StepDone():
                    note = step_note(event.image_index, pictures, event.step, event.steps)
                    watcher.show("drawing", event.of_all / wanted, event.eta_s, note)
                case Preview():
                    watcher.preview(event.image_index, event.picture.data)
                case Settled():
                    return job.future.result()

    def _told(self) -> tuple[str, float | None, str] | None:
        """Stage, share and a note on getting ready; None once that is done."""
        if self._failure is not None:
            raise self._failure
        status = self._engine.status()
        if status.state == "ready":
            return None
        if status.state in ("loading", "warming_up"):
            step, (stage, share) = self._loading, stage_of(status)
            is_loading = status.state == "loading" and step is not None
            note = bytes_note(step.done_bytes, step.total_bytes) if step and is_loading else ""
            return stage, share, note
        raise DrawingError("the model cannot be used any more; start again")

    def _loaded(self, progress: Callable[[LoadStep], None]) -> Pipeline:
        """The loader, overheard. Runs on the engine's thread."""

        def report(step: LoadStep) -> None:
            if step.component not in self._components[-1:]:
                self._components.append(step.component)
                self._part_began_s = time.monotonic()
            self._loading = step
            progress(step)

        try:
            pipeline = self._load(report)
        except Exception as error:
            self._failure = error
            raise
        self.load_ms = (time.monotonic() - self._began_s) * 1000
        return pipeline


def _leave(status: int) -> None:
    """End at once. The interpreter's own end would abort under a thread in native code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
