"""Steps are taken as one only where a trial shows a gain, and no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxcore import FluxPipeline
from fluxcore.pipeline import joint_steps
from fluxcore.pipeline.joint_steps import (
    COUNTS,
    LEAST_GAIN,
    LONGEST_FIRST_S,
    LONGEST_TRIED_S,
    MOST_TOKENS,
    SHAPES_KEPT,
    Batching,
    JointSteps,
)
from tests.unit.joint_steps.conftest import Device, shares_of
from tests.unit.test_pipeline import painting, params


@pytest.mark.parametrize(
    ("batching", "given", "rows"),
    [
        ("exact", {}, 4),
        ("off", {}, 1),
        ("exact", {"shares": {2: 1.01, 4: 1 - LEAST_GAIN / 2}}, 1),
        ("exact", {"shares": {2: 0.9, 4: 0.95}}, 2),
        ("exact", {"shares": {2: 0.9, 4: 0.8}}, 4),
        ("exact", {"depends": True}, 1),
        ("fast", {"depends": True}, 4),
        ("fast", {"alone_s": 2 * LONGEST_TRIED_S}, 1),
    ],
)
def test_only_what_pays_is_joined(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    batching: Batching,
    given: dict[str, Any],
    rows: int,
) -> None:
    device = joining(pipe, batching, **given)
    pipe.generate(params(n=4))
    device.rows.clear()
    pipe.generate(params(n=4))
    assert set(device.rows) == {rows}


def test_exact_says_no_to_a_last_bit_of_any_row(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = joining(pipe)

    def velocity(img: Tensor, *rest: Any) -> Tensor:
        found = device.velocity(img, *rest)
        if len(img) == 4:
            last = found[3].flatten()[-1:]
            last.copy_(torch.nextafter(last, torch.ones(1)))
        return found

    monkeypatch.setattr(pipe, "_velocity_of", velocity)
    pipe.generate(params(n=4, steps=1))
    assert shares_of(pipe) == {2: pytest.approx(0.87), 4: 1.0}


@pytest.mark.parametrize(
    ("first_s", "alone_s", "calls"),
    [(1.1 * LONGEST_FIRST_S, 0.01, 1), (0.9 * LONGEST_FIRST_S, 1.1 * LONGEST_TRIED_S, 2)],
)
def test_a_long_step_is_tried_no_further(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    first_s: float,
    alone_s: float,
    calls: int,
) -> None:
    device = joining(pipe, first_s=first_s, alone_s=alone_s)
    work = pipe.run(params(n=2))
    assert [next(work).stage for _ in range(2)] == ["text", "trial"]
    assert device.rows == [1] * calls
    # Nor for another number.
    assert shares_of(pipe) == {2: 1.0, 4: 1.0}


def test_too_many_tokens_are_never_tried(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = joining(pipe)
    tokens = 512 + 16
    monkeypatch.setattr(joint_steps, "MOST_TOKENS", 4 * tokens - 1)
    pipe.generate(params(n=4))
    assert set(device.rows) == {1, 2}
    assert shares_of(pipe) == {2: pytest.approx(0.87), 4: 1.0}
    monkeypatch.setattr(joint_steps, "MOST_TOKENS", 2 * tokens - 1)
    device.rows.clear()
    assert "trial" not in pipe.generate(params(n=4)).timings
    assert set(device.rows) == {1}
    assert MOST_TOKENS < 8 * (512 + 1024)  # four of 512x512 do, eight would not


def test_another_split_of_as_many_tokens_is_tried_for_itself(
    pipe: FluxPipeline, joining: Callable[..., Device]
) -> None:
    """The last product has a row for each token of the picture, and none of a reference."""
    joining(pipe)
    pipe.generate(params(width=64, height=64, references=(painting(64, 96),), n=2))
    assert shares_of(pipe, width=64, height=64, references=(painting(64, 96),))[2] is not None
    assert shares_of(pipe, width=64, height=96, references=(painting(64, 64),))[2] is None


def test_few_sizes_are_remembered(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    joining(pipe)
    assert SHAPES_KEPT >= 16
    monkeypatch.setattr(joint_steps, "SHAPES_KEPT", 3)
    for width in range(64, 64 + 16 * 8, 16):
        pipe.generate(params(n=2, steps=1, width=width))
    assert len(pipe.joint._shares) == 3 * len(COUNTS)
    assert shares_of(pipe, width=64)[2] is None
    assert shares_of(pipe, width=64 + 16 * 7)[2] is not None


@pytest.mark.parametrize("given", [{"compiles": True}, {"residency": "low"}])
def test_networks_that_take_one_form_only_are_not_joined(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
) -> None:
    runtime = replace(pipe.runtime, **given)
    device = joining(pipe, "fast")
    joint = JointSteps(device.velocity, runtime, "fast")
    monkeypatch.setattr(pipe, "joint", joint)
    assert "trial" not in pipe.generate(params(n=2, steps=1)).timings
    assert set(device.rows) == {1}


def test_warming_up_tries_each_size(pipe: FluxPipeline, joining: Callable[..., Device]) -> None:
    device = joining(pipe)
    pipe.warm_up([(64, 64), (96, 64)])
    device.rows.clear()
    assert "trial" not in pipe.generate(params(n=4, width=96)).timings
    assert set(device.rows) == {4}
