"""Who waits for whom: the worker for nobody, the packing threads and the answer for little."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from collections.abc import Generator
from concurrent.futures import Future, wait
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from app.engine import PackedPicture, Packing, engine, packing
from app.engine.scheduler import Scheduler
from app.telemetry import configure_logging
from fluxcore.drawn import DrawnPicture
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S, StartLive, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, as_drawn
from tests.service.test_packing import MADE


def test_the_worker_draws_on_while_pictures_cannot_be_packed(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, go_on = packing.pack_picture, threading.Event()

    def stuck(*given: object) -> object:
        assert go_on.wait(PATIENCE_S)
        return plain(*given)  # type: ignore[arg-type]

    live = start_live()
    monkeypatch.setattr(packing, "pack_picture", stuck)
    answers = [live.generate_later(f"job {i}") for i in range(4)]
    wait_until(lambda: len(live.pipeline.ended) == 4)
    assert [later._answer for later in answers] == [None] * 4
    go_on.set()
    assert [later.answer().status_code for later in answers] == [200] * 4


def test_a_picture_is_packed_while_all_threads_for_strips_are_busy() -> None:
    pool, go_on, delivered = packing.PackingPool(), threading.Event(), threading.Event()
    packed: list[Future[PackedPicture]] = []

    def deliver(done: list[Future[PackedPicture]]) -> None:
        packed.extend(done)
        delivered.set()

    for _ in range(packing.STRIP_THREADS):
        pool._strips.submit(go_on.wait, PATIENCE_S)
    try:
        noise = as_drawn(Image.effect_noise((256, 256), 60).convert("RGB"))
        pool.pack([(noise, MADE)], Packing(), deliver)
        assert delivered.wait(PATIENCE_S / 2)
        assert Image.open(io.BytesIO(packed[0].result().data)).size == (256, 256)
    finally:
        go_on.set()
        pool.close()


def test_a_picture_that_is_packed_at_once_is_not_delivered_by_the_worker() -> None:
    pool, threads = packing.PackingPool(), list[str]()
    submit = pool._pool.submit

    def submit_and_wait(*given: Any) -> Future[Any]:
        future = submit(*given)
        wait([future])
        return future

    pool._pool.submit = submit_and_wait  # type: ignore[method-assign, assignment]
    pictures = [(as_drawn(Image.new("RGB", (64, 64))), MADE)] * 2
    pool.pack(pictures, Packing(), lambda _: threads.append(threading.current_thread().name))
    pool.close()
    assert len(threads) == 1 and threads[0].startswith("fluxd-pack")


def test_what_cannot_be_delivered_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def deliver(_: object) -> None:
        raise ValueError("nobody is there")

    pool = packing.PackingPool()
    pool.pack([(as_drawn(Image.new("RGB", (64, 64))), MADE)], Packing(), deliver)
    pool.close()
    assert "nobody is there" in caplog.text


def test_nothing_of_a_picture_stays_while_no_job_waits(start_live: StartLive) -> None:
    """Not even until a collector comes: pixels of large pictures lie in memory that is scarce."""
    left: list[weakref.ref[DrawnPicture]] = []

    class Remembering(FakePipeline):
        def run(
            self, params: GenerationParams, *, alone: bool = False
        ) -> Generator[FakeSlice, None, FakeResult]:
            result = yield from super().run(params)
            pictures = [DrawnPicture(result.pictures[0].pixels.copy()) for _ in result.seeds]
            left.extend(weakref.ref(picture) for picture in pictures)
            return replace(result, pictures=pictures)

        def decode(self, latents: int, width: int, height: int) -> DrawnPicture:
            picture = super().decode(latents, width, height)
            left.append(weakref.ref(picture))
            return picture

    live = start_live(Remembering())
    gc.disable()
    try:
        with live.client() as client:
            asked = {"prompt": "x", "n": 2, "previews": 1, "stream": True}
            assert client.post("/v1/generate", json=asked).status_code == 200
        wait_until(lambda: live.engine.is_idle)
        wait_until(lambda: not any(picture() is not None for picture in left))
        assert len(left) == 2 + 2
    finally:
        gc.enable()


def test_the_answer_does_not_wait_for_the_line_in_the_log(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    held = {**vars(time), "sleep": lambda lead_s: go_on.wait(PATIENCE_S)}
    monkeypatch.setattr(engine, "time", SimpleNamespace(**held))
    stream, live = io.StringIO(), start_live()
    configure_logging("info", "plain", stream)
    assert live.generate("a red fox").status_code == 200
    assert "job done" not in stream.getvalue()
    # Nor does the job count as one that runs.
    wait_until(lambda: live.engine.is_idle)
    assert "job done" not in stream.getvalue()
    go_on.set()
    wait_until(lambda: "job done" in stream.getvalue())


def test_the_worker_sleeps_on_when_a_picture_is_packed_and_no_job_waits(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, go_on = packing.pack_picture, threading.Event()
    choose, looks = Scheduler._next_turn, 0

    def stuck(*given: object) -> object:
        assert go_on.wait(PATIENCE_S)
        return plain(*given)  # type: ignore[arg-type]

    def counted(scheduler: Scheduler) -> object:
        nonlocal looks
        looks += 1
        return choose(scheduler)

    monkeypatch.setattr(engine, "ANSWER_LEAD_S", 0.1)
    monkeypatch.setattr(packing, "pack_picture", stuck)
    monkeypatch.setattr(Scheduler, "_next_turn", counted)
    stream, live = io.StringIO(), start_live()
    configure_logging("info", "plain", stream)
    later = live.generate_later("a red fox", steps=2)
    # When it began to wait, one for each of the slices, the end, and one that finds nothing.
    wait_until(lambda: looks == 1 + 4 + 1 + 1)
    go_on.set()
    assert later.answer().status_code == 200
    wait_until(lambda: "job done" in stream.getvalue())
    assert looks == 1 + 4 + 1 + 1
