"""What a watcher of a job sees: order, late comers, previews, and watchers that fail."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image, ImageChops, ImageStat

from app.engine import (
    Engine,
    Job,
    JobEvent,
    JobOptions,
    Packing,
    Preview,
    Queued,
    Settled,
    Started,
    StepDone,
)
from app.engine.events import EventLog
from app.engine.previews import preview_steps
from app.errors import ClientLeftError
from fluxcore import FluxPipeline
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S, wait_until
from tests.service.fake_pipeline import FakePipeline


def heard_of(log: EventLog) -> list[JobEvent]:
    """What holds now."""
    heard: list[JobEvent] = []
    log.watch(heard.append)()
    return heard


class Turnstile(threading.Event):
    """Lets so many waiters through; all of them once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = threading.Semaphore(0)

    def let(self, count: int) -> None:
        self._passes.release(count)

    def set(self) -> None:
        super().set()
        self._passes.release()

    def wait(self, timeout: float | None = None) -> bool:
        if not self._passes.acquire(timeout=timeout):
            return False
        if self.is_set():
            self._passes.release()
        return True


@contextmanager
def started(pipeline: FakePipeline | FluxPipeline) -> Iterator[Engine]:
    engine = Engine(lambda progress: pipeline)
    engine.start()
    wait_until(lambda: engine.status().is_ready)
    try:
        yield engine
    finally:
        if isinstance(pipeline, FakePipeline):
            pipeline.gate.set()
        engine.stop()


def submit(engine: Engine, prompt: str = "x", previews: int = 0, **given: object) -> Job:
    params = GenerationParams(prompt=prompt, **given)  # type: ignore[arg-type]
    return engine.submit(params, Packing(), f"req-{prompt}", JobOptions(previews=previews))


def watched(job: Job) -> list[JobEvent]:
    seen: list[JobEvent] = []
    job.watch(seen.append)
    return seen


def until_settled(seen: list[JobEvent]) -> None:
    wait_until(lambda: Settled() in seen)


def test_a_watcher_sees_every_step_of_every_picture_in_order() -> None:
    pipeline = FakePipeline()
    with started(pipeline) as engine:
        pipeline.close_gate()
        job = submit(engine, steps=3, n=2)
        seen = watched(job)
        pipeline.gate.set()
        until_settled(seen)
    steps = [e for e in seen if isinstance(e, StepDone)]
    assert [(e.image_index, e.step, e.steps) for e in steps] == [
        (image, step, 3) for image in (0, 1) for step in (1, 2, 3)
    ]
    assert all(e.eta_s is not None and e.eta_s >= 0 for e in steps)
    order = [type(e) for e in seen if not isinstance(e, Queued)]
    assert order == [Started, *[StepDone] * 6, Settled]
    assert job.future.result(0).pictures


def test_a_waiting_job_is_told_its_place_as_it_moves_up() -> None:
    pipeline = FakePipeline()
    with started(pipeline) as engine:
        pipeline.close_gate()
        submit(engine, "first")
        assert pipeline.started.wait(PATIENCE_S)
        left, last = submit(engine, "left"), submit(engine, "last")
        seen = watched(last)
        engine.cancel(left, ClientLeftError("gone"))
        places = [e.position for e in seen if isinstance(e, Queued)]
        assert places == [2, 1]
        pipeline.gate.set()
        until_settled(seen)


def test_a_late_watcher_gets_the_present_state_first() -> None:
    pipeline = FakePipeline()
    with started(pipeline) as engine:
        pipeline.close_gate()
        first, second, third = (submit(engine, name) for name in ("a", "b", "c"))
        assert pipeline.started.wait(PATIENCE_S)
        assert watched(first) == [Started()]
        assert [e.position for e in watched(third) if isinstance(e, Queued)] == [2]
        pipeline.gate.set()
        second.future.result(PATIENCE_S)
        until_settled(watched(first))
        # Nothing but the end is told of a job that is over.
        assert watched(first) == [Settled()]


def test_when_a_job_should_be_done_is_worked_out_for_those_who_watch() -> None:
    pipeline, turnstile, asked = FakePipeline(), Turnstile(), 0
    with started(pipeline) as engine:
        pipeline.gate = turnstile
        job = submit(engine, steps=3)
        plain = job.eta_s

        def counted() -> float | None:
            nonlocal asked
            asked += 1
            return plain()

        job.eta_s = counted
        turnstile.let(2)
        wait_until(lambda: any(isinstance(event, StepDone) for event in heard_of(job.events)))
        assert asked == 0
        (step,) = (event for event in watched(job) if isinstance(event, StepDone))
        assert (step.step, asked) == (1, 1)
        assert step.eta_s is not None and step.eta_s >= 0
        turnstile.set()
        job.future.result(PATIENCE_S)


def test_what_was_told_last_stays_where_nothing_newer_is_known() -> None:
    log, heard = EventLog(), list[JobEvent]()
    log.emit(Started())
    log.emit(StepDone(0, 1, 3, 1, 4.0))
    log.watch(heard.append)
    assert heard == [Started(), StepDone(0, 1, 3, 1, 4.0)]


def test_a_job_that_fails_or_is_cancelled_settles_once() -> None:
    pipeline = FakePipeline()
    with started(pipeline) as engine:
        failed = watched(submit(engine, "fail"))
        until_settled(failed)
        pipeline.close_gate()
        submit(engine, "first")
        waiting = submit(engine, "waiting")
        seen = watched(waiting)
        engine.cancel(waiting, ClientLeftError("gone"))
        engine.cancel(waiting, ClientLeftError("gone"))
    assert failed.count(Settled()) == seen.count(Settled()) == 1
    assert seen[-1] == failed[-1] == Settled()
    assert Started() not in seen


def test_previews_show_the_predicted_clean_picture_of_spread_steps() -> None:
    pipeline = FakePipeline()
    with started(pipeline) as engine:
        pipeline.close_gate()
        job = submit(engine, previews=2, steps=6, n=2, width=64, height=96, seed=7)
        seen = watched(job)
        pipeline.gate.set()
        until_settled(seen)
    previews = [e for e in seen if isinstance(e, Preview)]
    assert [(e.image_index, e.step) for e in previews] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert pipeline.decoded == [2, 4, 102, 104]
    for event in previews:
        picture = event.picture
        assert (picture.width, picture.height, picture.format) == (64, 96, "png")
        assert picture.seed == 7 + event.image_index
        shade = Image.open(io.BytesIO(picture.data)).getpixel((0, 0))
        assert shade == (100 * event.image_index + event.step,) * 3
        assert seen.index(StepDoneAt(event)) < seen.index(event)


class StepDoneAt:
    """Equal to the step that a preview shows."""

    def __init__(self, preview: Preview) -> None:
        self._key = (preview.image_index, preview.step)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepDone) and (other.image_index, other.step) == self._key


def test_a_preview_that_cannot_be_decoded_does_not_harm_the_job(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline = FakePipeline(undecodable={2})
    with started(pipeline) as engine:
        job = submit(engine, previews=3, steps=4)
        assert job.future.result(PATIENCE_S).pictures
    assert pipeline.decoded == [1, 2]
    assert "no more previews" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "first", "last", "steps"),
    [
        (0, 1, 4, set()),
        (1, 1, 4, {2}),
        (2, 1, 4, {1, 2}),
        (3, 1, 4, {1, 2, 3}),
        (99, 1, 4, {1, 2, 3}),
        (3, 1, 50, {12, 25, 37}),
        (5, 1, 1, set()),
        (2, 26, 50, {33, 41}),
    ],
)
def test_previews_are_spread_and_never_the_last_step(
    wanted: int, first: int, last: int, steps: set[int]
) -> None:
    assert preview_steps(wanted, first, last) == steps


def test_previews_are_as_many_as_wanted_wherever_there_are_steps() -> None:
    for wanted in range(12):
        for last in range(1, 60):
            chosen = preview_steps(wanted, 1, last)
            assert len(chosen) == min(wanted, last - 1)
            assert all(1 <= step < last for step in chosen)


def test_previews_of_a_real_model_come_closer_to_the_picture(tiny_pipeline: FluxPipeline) -> None:
    with started(tiny_pipeline) as engine:
        job = submit(engine, previews=3, width=64, height=64, seed=1)
        seen = watched(job)
        until_settled(seen)
        final = Image.open(io.BytesIO(job.future.result(0).pictures[0].data))
    shown = [Image.open(io.BytesIO(e.picture.data)) for e in seen if isinstance(e, Preview)]
    far = [sum(ImageStat.Stat(ImageChops.difference(p, final)).mean) for p in shown]
    assert len(far) >= 2
    assert far[-1] < far[0]


def test_a_seed_that_was_drawn_stands_in_the_job(tiny_pipeline: FluxPipeline) -> None:
    with started(tiny_pipeline) as engine:
        job = submit(engine, width=64, height=64, n=2)
        outcome = job.future.result(PATIENCE_S)
    assert job.params.seed == outcome.pictures[0].seed
    assert outcome.pictures[1].seed == outcome.pictures[0].seed + 1


def test_a_watcher_that_fails_is_dropped_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = EventLog()

    def broken(event: JobEvent) -> None:
        raise RuntimeError("the loop is closed")

    heard: list[JobEvent] = []
    log.watch(broken)
    log.watch(heard.append)
    with caplog.at_level(logging.ERROR):
        log.emit(Started())
        log.emit(Settled())
    assert heard == [Started(), Settled()]
    assert caplog.text.count("a watcher of the job failed") == 1


def test_a_watcher_can_stop_even_from_within() -> None:
    log = EventLog()
    heard: list[JobEvent] = []

    def once(event: JobEvent) -> None:
        heard.append(event)
        stop()

    stop = log.watch(once)
    log.emit(Started())
    log.emit(StepDone(0, 1, 4, 1, None))
    stop()
    assert heard == [Started()]
    assert not log.is_watched


def test_what_comes_after_its_time_is_dropped() -> None:
    log = EventLog()
    heard: list[JobEvent] = []
    log.watch(heard.append)
    log.emit(Queued(1, None))
    log.emit(Started())
    log.emit(Queued(1, None))
    log.emit(Settled())
    log.emit(Started())
    assert heard == [Queued(1, None), Started(), Settled()]
