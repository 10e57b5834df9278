"""Pictures of one job whose steps are taken as one: the same as one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fluxcore import FluxPipeline
from tests.unit.joint_steps.conftest import REQUESTS, Device
from tests.unit.running_ahead import told_ahead
from tests.unit.test_pipeline import params, pixels


@pytest.mark.parametrize("is_real", [False, True], ids=["rows apart", "rows as they come"])
@pytest.mark.parametrize("kind", REQUESTS)
def test_pictures_drawn_side_by_side_are_those_drawn_one_by_one(
    pipes: dict[str, FluxPipeline], joining: Callable[..., Device], kind: str, is_real: bool
) -> None:
    model, fields = REQUESTS[kind]
    pipe = pipes[model]
    expected = [
        pixels(pipe.generate(params(seed=7 + i, **fields)))[0] for i in range(2 if is_real else 5)
    ]
    assert len(set(expected)) == len(expected)
    device = joining(pipe, is_real=is_real)
    for n in (2,) if is_real else (2, 3, 4, 5):
        result = pipe.generate(params(n=n, **fields))
        assert pixels(result) == expected[:n]
        assert result.seeds == [7 + i for i in range(n)]
    assert is_real or max(device.rows) == 4


@pytest.mark.parametrize(
    ("model", "n", "groups"),
    [
        ("distilled", 2, [2]),
        ("distilled", 3, [2, 1]),
        ("distilled", 5, [4, 1]),
        # Each picture makes two calls in a step.
        ("base", 1, [2]),
        ("base", 2, [4]),
        ("base", 3, [4, 2]),
    ],
)
def test_so_many_rows_are_taken_as_one(
    pipes: dict[str, FluxPipeline],
    joining: Callable[..., Device],
    model: str,
    n: int,
    groups: list[int],
) -> None:
    device = joining(pipes[model])
    fields = {"guidance": 3.0} if model == "base" else {}
    first = pipes[model].generate(params(n=n, **fields))
    assert "trial" in first.timings
    device.rows.clear()
    again = pipes[model].generate(params(n=n, **fields))
    assert device.rows == [count for count in groups for _ in range(2)]
    assert "trial" not in again.timings
    assert pixels(again) == pixels(first)


def test_progress_tells_the_steps_of_a_group_one_after_the_other(
    pipe: FluxPipeline, joining: Callable[..., Device]
) -> None:
    joining(pipe)
    told = list(pipe.run(params(n=3)))
    assert [(p.stage, p.image_index, p.step, p.has_more) for p in told] == [
        ("text", 0, 0, False),
        ("trial", 0, 0, False),
        *(("denoise", i, step, i == 0) for step in (1, 2) for i in (0, 1)),
        *(("decode", i, 2, False) for i in (0, 1)),
        *(("denoise", 2, step, False) for step in (1, 2)),
        # Nothing but the result comes after it.
        ("decode", 2, 2, True),
    ]
    for p in told:
        assert (p.denoise_step is not None) == (p.stage == "denoise")
    seen: list[tuple[int, int]] = []
    pipe.generate(params(n=2), on_step=lambda step, index: seen.append((index, step.index)))
    assert seen == [(0, 1), (1, 1), (0, 2), (1, 2)]


def test_one_picture_is_begun_only_once(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    joining(pipe)
    begun: list[int] = []
    plain = pipe.denoising

    def denoising(job: Any, index: int, encoded: Any) -> Any:
        begun.append(index)
        return plain(job, index, encoded)

    monkeypatch.setattr(pipe, "denoising", denoising)
    pipe.generate(params(n=3))
    assert begun == [0, 1, 2]


def test_a_group_is_queued_ahead_and_waited_for_once_a_step(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    joining(pipe)
    pipe.generate(params(n=2, steps=3))
    told = told_ahead(pipe, monkeypatch)
    pipe.generate(params(n=2, steps=3), lambda step, i: told.append(f"shown {i}.{step.index}"))
    assert told == [
        # the text, which is at hand
        *("waited for 1", "prepared", "prepared"),
        *("begun", "begun", "waited for 2", "shown 0.1", "shown 1.1"),
        *("begun", "waited for 3", "shown 0.2", "shown 1.2"),
        *("decoding", "waited for 4", "shown 0.3", "shown 1.3", "decoding"),
    ]


def test_a_group_is_all_queued_with_its_last_decoding(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    joining(pipe)
    pipe.generate(params(n=2))
    told = told_ahead(pipe, monkeypatch)
    run = pipe.run(params(n=2))
    run.meanwhile(lambda: told.append("meanwhile"))
    told.extend(done.stage for done in run)
    assert told[-4:] == ["decode", "decoding", "meanwhile", "decode"]
    assert told.count("meanwhile") == 1


@pytest.mark.parametrize("stage", ["text", "decode"])
@pytest.mark.parametrize("lost", ["after a fault", "for other sizes"])
def test_a_picture_that_was_prepared_fits_those_that_are_not(
    pipe: FluxPipeline,
    joining: Callable[..., Device],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    lost: str,
) -> None:
    """Between two slices another job may make the tables of positions go."""
    joining(pipe)
    request = params(n=6, steps=2)  # four at once, then two
    expected = pixels(pipe.generate(request))
    told_ahead(pipe, monkeypatch)
    pipe.conditioning_cache.clear()
    work = pipe.run(request)
    while True:
        try:
            done = next(work)
        except StopIteration as end:
            assert pixels(end.value) == expected
            return
        if done.stage == stage and lost == "after a fault":
            pipe.forget()
        elif done.stage == stage:
            for rows in range(5, 22):
                pipe.rope_tables.get((rows, 4), [])
