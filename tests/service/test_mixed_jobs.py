"""Jobs of every kind at once, on a device that runs ahead: each one's pictures are its own."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.engine import Engine, Job, JobOptions, Packing
from app.engine.jobs import Priority
from app.errors import ClientLeftError
from app.main import pipeline_loader
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import DeviceFaultError
from fluxcore.pipeline.run import Run
from fluxcore.runtime import Runtime
from tests.service.conftest import StartLive, settings_for_tests, wait_until

JOBS = 16
PROMPTS = ("a red circle", "two blue stars", "a green heart", "a yellow square")
SIZES = ((64, 64), (64, 64), (96, 64), (128, 64))
FAULTY = 0.15
"""Share of pictures that come out broken; the second try of one may, too."""


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each job that was begun behind another, whether its first step was queued."""
    seen: list[bool] = []
    begin = Run.begin

    def noted(run: Run) -> None:
        begin(run)
        seen.append(bool(run.begun))

    monkeypatch.setattr(Runtime, "runs_ahead", True)
    monkeypatch.setattr(Runtime, "has_recorded", lambda *_: True)
    monkeypatch.setattr(Run, "begin", noted)
    return seen


@pytest.mark.parametrize("batching", ["off", "exact"])
def test_each_gets_what_it_would_get_alone(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch, begun: list[bool], batching: str
) -> None:
    chance = random.Random(5)
    settings = {"device": "cpu", "batching": batching, "in_flight_limit": 4, "queue_limit": JOBS}
    live = start_live(load=pipeline_loader(None, settings_for_tests(**settings)), settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr(FluxPipeline, "begin_decode", sometimes_faulty())
        asked = [params(chance, number) for number in range(JOBS)]
        jobs = [submit(live.engine, one, chance) for one in asked]
        for job in chance.sample(jobs, 4):
            live.engine.cancel(job, ClientLeftError("gone"))
        wait_until(lambda: all(job.is_settled for job in jobs))
    pipe: Any = live.engine._worker._loaded
    drawn = [(job, one) for job, one in zip(jobs, asked, strict=True) if not job.future.exception()]
    assert len(drawn) > JOBS / 2
    for job, one in drawn:
        pictures = [Image.open(io.BytesIO(p.data)) for p in job.future.result().pictures]
        for found, expected in zip(pictures, pipe.generate(one).images, strict=True):
            assert np.array_equal(np.asarray(found), np.asarray(expected)), one
    assert begun and (any(begun) or batching != "off")
    worker = live.engine._worker
    assert not worker._flights and worker._ahead is None


def sometimes_faulty() -> Any:
    begin_decode, chance = FluxPipeline.begin_decode, random.Random(7)

    def begin(pipe: FluxPipeline, *args: Any) -> Any:
        finish, is_broken = begin_decode(pipe, *args), chance.random() < FAULTY

        def finished() -> Any:
            picture = finish()
            if is_broken:
                raise DeviceFaultError("a picture of one colour")
            return picture

        return finished

    return begin


def params(chance: random.Random, number: int) -> GenerationParams:
    width, height = chance.choice(SIZES)
    return GenerationParams(
        prompt=chance.choice(PROMPTS) + chance.choice(["", f" {number}"]),
        width=width,
        height=height,
        steps=chance.choice([1, 2, 4]),
        seed=number,
        n=chance.choice([1, 1, 2]),
    )


def submit(engine: Engine, asked: GenerationParams, chance: random.Random) -> Job:
    options = JobOptions(
        previews=chance.choice([0, 0, 2]),
        priority=chance.choice(list(Priority)),
        client=chance.choice("ab"),
        is_admitted=True,
    )
    return engine.submit(asked, Packing(), f"job-{asked.seed}", options)
