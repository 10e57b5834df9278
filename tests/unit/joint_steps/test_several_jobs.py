"""Steps of several jobs as one: those that are alike, and each job for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.pipeline.run import Run
from fluxcore.runtime import Runtime
from tests.unit.joint_steps.conftest import REQUESTS, Device
from tests.unit.test_pipeline import finish, painting, params, pixels


def prepared(pipe: FluxPipeline, *wanted: GenerationParams) -> list[Run]:
    """Runs whose prompts and references are encoded."""
    runs = [pipe.run(one) for one in wanted]
    for run, one in zip(runs, wanted, strict=True):
        for _ in range(1 + len(one.references)):
            next(run)
    return runs


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("kind", ["plain", "reference", "mask"])
def test_jobs_that_are_alike_take_their_steps_as_one(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    ahead: bool,
) -> None:
    _, fields = REQUESTS[kind]
    wanted = [params(prompt=f"fox {i}", seed=20 + i, **fields) for i in range(4)]
    expected = [pixels(pipe.generate(one)) for one in wanted]
    monkeypatch.setattr(Runtime, "runs_ahead", ahead)
    device = joining(pipe)
    runs = prepared(pipe, *wanted)
    assert pipe.share(runs[0], 4) == pytest.approx(0.865)
    assert pipe.share(runs[1], 2) == pytest.approx(0.87)
    assert runs[0].times.milliseconds["trial"] > 0
    assert "trial" not in runs[1].times.milliseconds
    device.rows.clear()
    skipped = pipe.prepare(wanted[0]).params.start_step
    for step in (skipped + 1, skipped + 2):
        before = [run.times.milliseconds.get("denoise", 0.0) for run in runs]
        assert pipe.begin_together(runs)
        assert all(
            run.times.milliseconds["denoise"] > ms for run, ms in zip(runs, before, strict=True)
        )
        assert [next(run).step for run in runs] == [step] * 4
    assert device.rows == [4, 4]
    assert [pixels(finish(run)) for run in runs] == expected  # type: ignore[arg-type]


def test_one_of_two_may_be_given_up_between_steps(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [params(prompt=f"fox {i}", steps=3, seed=i) for i in range(2)]
    expected = pixels(pipe.generate(wanted[1]))
    for ahead in (False, True):
        monkeypatch.setattr(Runtime, "runs_ahead", ahead)
        joining(pipe)
        runs = prepared(pipe, *wanted)
        pipe.share(runs[0], 2)
        assert pipe.begin_together(runs)
        assert [next(run).step for run in runs] == [1, 1]
        runs[0].close()
        assert not runs[0].begun and not runs[0]._pictures
        with pytest.raises(StopIteration):
            next(runs[0])
        assert pixels(finish(runs[1])) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [{"width": 96}, {"steps": 3}, {"schedule": "linear"}, {"references": (painting(64, 64),)}],
)
def test_jobs_that_differ_are_left_as_they_are(
    pipe: FluxPipeline, joining: Callable[..., Device], other: dict[str, Any]
) -> None:
    wanted = [params(seed=1), params(**{"seed": 2, **other})]
    expected = [pixels(pipe.generate(one)) for one in wanted]
    device = joining(pipe)
    runs = prepared(pipe, *wanted)
    assert not pipe.begin_together(runs)
    assert not device.rows
    assert [pixels(finish(run)) for run in runs] == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_jobs_at_different_steps_are_left_as_they_are(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    monkeypatch: pytest.MonkeyPatch,
    ahead: bool,
) -> None:
    wanted = [params(steps=4, seed=1), params(steps=4, seed=2)]
    expected = [pixels(pipe.generate(one)) for one in wanted]
    monkeypatch.setattr(Runtime, "runs_ahead", ahead)
    device = joining(pipe)
    runs = prepared(pipe, *wanted)
    next(runs[0])
    device.rows.clear()
    assert not pipe.begin_together(runs)
    assert not device.rows
    # Once the other has caught up they go on as one.
    next(runs[1])
    assert pipe.begin_together(runs)
    assert [pixels(finish(run)) for run in runs] == expected  # type: ignore[arg-type]


def test_the_share_of_a_guided_job_is_of_what_it_takes_with_its_own_two_calls_joined(
    pipes: dict[str, FluxPipeline], joining: Callable[..., Device]
) -> None:
    base = pipes["base"]
    guided = params(guidance=3.0, steps=1)
    for shares, of_two, of_four in [
        ({2: 0.9, 4: 0.6}, 0.6 / 0.9, 0.6 / 0.9),
        ({2: 0.87, 4: 0.865}, 1.0, 1.0),
        ({2: 0.8, 4: 1.0}, 1.0, 1.0),
        ({2: 1.0, 4: 0.8}, 0.8, 0.8),
    ]:
        joining(base, shares=shares)
        (run,) = prepared(base, guided)
        assert base.share(run, 2) == pytest.approx(of_two)
        assert base.share(run, 4) == pytest.approx(of_four)


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_a_share_can_be_asked_for_at_any_step(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    monkeypatch: pytest.MonkeyPatch,
    shown: int,
) -> None:
    """Even where all steps have been begun."""
    wanted = params(steps=4)
    expected = pixels(pipe.generate(wanted))
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    joining(pipe)
    (run,) = prepared(pipe, wanted)
    for _ in range(shown):
        next(run)
    assert pipe.share(run, 2) == pytest.approx(0.87)
    assert pixels(finish(run)) == expected  # type: ignore[arg-type]
