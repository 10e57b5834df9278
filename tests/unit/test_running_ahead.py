"""What a device that runs ahead is given before the host waits for the last of it."""

from __future__ import annotations

import pytest

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.pipeline import ConditioningCache
from fluxcore.pipeline.joint_steps import JointSteps
from tests.unit.running_ahead import told_ahead
from tests.unit.test_pipeline import params, pixels


@pytest.fixture
def pipe(tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> FluxPipeline:
    """The shared model with an empty cache of its own."""
    monkeypatch.setattr(tiny_pipeline, "conditioning_cache", ConditioningCache(2**28))
    return tiny_pipeline


def test_a_gpu_has_the_next_work_before_the_last_is_waited_for(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = GenerationParams(prompt="a kite", width=64, height=64, steps=3, seed=1)
    expected = pipe.generate(params).images[0].tobytes()
    told = told_ahead(pipe, monkeypatch)
    pipe.conditioning_cache.clear()
    result = pipe.generate(params, lambda step, _: told.append(f"shown {step.index}"))
    assert told == [
        # the text is waited for
        *("prepared", "begun", "waited for 1"),
        *("begun", "waited for 2", "shown 1"),
        *("begun", "waited for 3", "shown 2"),
        *("decoding", "waited for 4", "shown 3"),
    ]
    assert result.images[0].tobytes() == expected
    assert result.timings["denoise"] > 0


@pytest.mark.parametrize(
    ("asked", "alone", "share", "is_begun"),
    [
        (params(), True, None, True),
        (params(), False, 1.0, True),
        (params(), False, None, False),
        (params(), False, 0.5, False),
        (params(n=2), True, 1.0, False),
    ],
    ids=["alone", "never joined", "not tried", "may be joined", "two pictures"],
)
def test_a_first_step_is_queued_behind_the_text_where_none_can_join_it(
    pipe: FluxPipeline,
    monkeypatch: pytest.MonkeyPatch,
    asked: GenerationParams,
    alone: bool,
    share: float | None,
    is_begun: bool,
) -> None:
    told = told_ahead(pipe, monkeypatch)
    monkeypatch.setattr(JointSteps, "share", lambda *_: share)
    work = pipe.run(asked, alone=alone)
    assert next(work).stage == "text"
    assert told.count("prepared") == 1
    assert ("begun" in told) is is_begun
    work.close()


def test_a_gpu_is_at_work_while_the_next_picture_is_prepared(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pixels(pipe.generate(params(n=2)))
    told = told_ahead(pipe, monkeypatch)
    result = pipe.generate(params(n=2), lambda step, i: told.append(f"shown {i}.{step.index}"))
    assert told == [
        *("waited for 1", "prepared"),
        *("begun", "begun", "waited for 2", "shown 0.1"),
        *("decoding", "waited for 3", "shown 0.2"),
        "prepared",
        *("begun", "begun", "waited for 4", "shown 1.1"),
        *("decoding", "waited for 5", "shown 1.2"),
    ]
    assert pixels(result) == expected
