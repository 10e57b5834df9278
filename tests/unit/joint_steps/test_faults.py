"""Steps as one where memory is full, and where a picture comes out broken."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from fluxcore import FluxPipeline
from fluxcore.errors import DeviceFaultError, OutOfMemoryError
from fluxcore.runtime import Runtime
from tests.unit.joint_steps.conftest import Device, shares_of
from tests.unit.test_pipeline import finish, params, pixels
from tests.unit.test_pipeline_faults import faulty


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(Runtime, "release_memory", lambda _: calls.append(1))
    return calls


def test_where_memory_is_full_steps_are_taken_one_by_one_from_then_on(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    released: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = [pixels(pipe.generate(params(seed=7 + i)))[0] for i in range(4)]
    device = joining(pipe)
    assert pixels(pipe.generate(params(n=4))) == expected
    device.full = {2, 4}
    device.rows.clear()
    with caplog.at_level(logging.WARNING):
        assert pixels(pipe.generate(params(n=4))) == expected
    assert device.rows == [4, 2, 1, 1, 1, 1, *[1] * 4]
    assert len(released) == 2
    assert [r.message[:30] for r in caplog.records if "do not fit" in r.message] == [
        "4 steps at once do not fit, on",
        "2 steps at once do not fit, on",
    ]
    device.rows.clear()
    pipe.generate(params(n=4))
    assert set(device.rows) == {1}


@pytest.mark.parametrize("later", [False, True], ids=["at once", "while it is timed"])
def test_a_trial_that_fills_the_memory_says_no(
    pipe: FluxPipeline, joining: Callable[..., Device], released: list[int], later: bool
) -> None:
    device = joining(pipe, full=set() if later else {2}, shares={2: 0.1})
    if later:
        plain = device.took_s

        def took_s(work: Callable[[], object], tries: int) -> float:
            # Seen alone three times, and then together.
            device.full = {2} if device.rows.count(2) else set()
            return plain(work, tries)

        device.took_s = took_s  # type: ignore[method-assign]
    work = pipe.run(params(n=2))
    assert [next(work).stage for _ in range(2)] == ["text", "trial"]
    assert released
    assert shares_of(pipe)[2] == 1.0
    assert len(finish(work).images) == 2  # type: ignore[arg-type]


def test_a_picture_that_does_not_even_fit_alone_ends_the_job(
    pipe: FluxPipeline, joining: Callable[..., Device], released: list[int]
) -> None:
    device = joining(pipe)
    pipe.generate(params(n=2))
    device.full = {1, 2}
    with pytest.raises(OutOfMemoryError):
        pipe.generate(params(n=2))
    device.full = set()
    assert len(pipe.generate(params(n=2)).images) == 2


def test_a_broken_picture_of_a_group_is_drawn_again_alone(
    pipe: FluxPipeline, joining: Callable[..., Device]
) -> None:
    device = joining(pipe)
    expected = pixels(pipe.generate(params(n=4)))
    device.rows.clear()
    with faulty(pipe.vae.decoder, None, float("nan")) as decodings:
        told = list(pipe.run(params(n=4)))
    assert len(decodings) == 5
    assert device.rows == [4, 4, 1, 1]
    repeated = [(p.image_index, p.step) for p in told if p.stage == "denoise"][8:]
    assert repeated == [(1, 1), (1, 2)]
    with faulty(pipe.vae.decoder, None, float("nan")):
        assert pixels(pipe.generate(params(n=4))) == expected


def test_what_was_kept_is_dropped_and_a_second_fault_is_raised(
    pipe: FluxPipeline, joining: Callable[..., Device]
) -> None:
    joining(pipe)
    expected = pixels(pipe.generate(params(n=2)))
    nan = float("nan")
    misses = pipe.conditioning_cache.misses
    with (
        faulty(pipe.vae.decoder, None, nan, nan) as decodings,
        pytest.raises(DeviceFaultError),
    ):
        pipe.generate(params(n=2))
    assert len(decodings) == 3
    assert pipe.conditioning_cache.misses == misses + 1
    assert pixels(pipe.generate(params(n=2))) == expected
