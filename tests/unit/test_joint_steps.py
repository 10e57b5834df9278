"""Several steps as one: the same pictures, only where a trial shows a gain, and within memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import DeviceFaultError, OutOfMemoryError
from fluxcore.pipeline import ConditioningCache, joint_steps
from fluxcore.pipeline.encoded import EncodedJob
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
from fluxcore.pipeline.run import Run
from fluxcore.runtime import Runtime
from tests.unit.running_ahead import told_ahead
from tests.unit.test_pipeline import finish, painting, params, pixels
from tests.unit.test_pipeline_faults import faulty

FASTER = {2: 0.87, 4: 0.865}


@dataclass
class Device:
    """The transformer with a clock of its own, and everything that can be wrong with it.

    Attributes:
        shares: time of a call as one of so many, of its time alone.
        depends: a row's result depends on how many there are.
        full: numbers of rows that do not fit into memory.
        is_real: rows go through the network together, whatever that does to their last bits;
            otherwise one after the other.
        rows: of all calls so far.
    """

    plain: Callable[..., Tensor]
    shares: dict[int, float] = field(default_factory=lambda: dict(FASTER))
    alone_s: float = 0.01
    first_s: float = 0.01
    depends: bool = False
    full: set[int] = field(default_factory=set)
    is_real: bool = False
    rows: list[int] = field(default_factory=list)

    def velocity(self, img: Tensor, txt: Tensor, *rest: Any) -> Tensor:
        count = len(img)
        assert count == len(txt)
        self.rows.append(count)
        if count in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.is_real:
            return self.plain(img, txt, *rest)
        pairs = zip(img.split(1), txt.split(1), strict=True)
        found = torch.cat([self.plain(i.clone(), t.clone(), *rest) for i, t in pairs])
        return found * (1 + 1e-6 * (count - 1)) if self.depends else found

    def took_s(self, work: Callable[[], object], tries: int) -> float:
        seen = len(self.rows)
        for _ in range(tries):
            work()
        if seen == 0:
            return self.first_s
        last = self.rows[-1]
        return self.alone_s * last * self.shares.get(last, 1.0)


@pytest.fixture(scope="module")
def base_pipe(tiny_base_checkpoint: Path) -> FluxPipeline:
    return FluxPipeline.load(tiny_base_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def pipes(
    tiny_pipeline: FluxPipeline, base_pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> dict[str, FluxPipeline]:
    """A distilled and a base model, each with an empty cache of its own."""
    found = {"distilled": tiny_pipeline, "base": base_pipe}
    for pipe in found.values():
        monkeypatch.setattr(pipe, "conditioning_cache", ConditioningCache(2**28))
    return found


@pytest.fixture
def pipe(pipes: dict[str, FluxPipeline]) -> FluxPipeline:
    return pipes["distilled"]


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """Turn batching on for a pipeline, on a device as described."""

    originals: dict[int, Callable[..., Tensor]] = {}

    def begin(pipe: FluxPipeline, batching: Batching = "exact", **given: Any) -> Device:
        device = Device(originals.setdefault(id(pipe), pipe._velocity_of), **given)

        def took_s(_: JointSteps, work: Callable[[], object], tries: int = 3) -> float:
            return device.took_s(work, tries)

        monkeypatch.setattr(pipe, "_velocity_of", device.velocity)
        monkeypatch.setattr(JointSteps, "_took_s", took_s)
        joint = JointSteps(lambda *args: pipe._velocity_of(*args), pipe.runtime, batching)
        monkeypatch.setattr(pipe, "joint", joint)
        return device

    return begin


def mask_of(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


REQUESTS = {
    "plain": ("distilled", {}),
    "reference": ("distilled", {"references": (painting(96, 64),)}),
    "mask": (
        "distilled",
        {
            "references": (painting(64, 64),),
            "mask": mask_of(64, 64),
            "strength": 0.5,
            "steps": 3,
            "width": None,
            "height": None,
        },
    ),
    "guided": ("base", {"guidance": 3.0, "negative_prompt": "fog"}),
}


# --- pictures of one job -----------------------------------------------------


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


# --- trials ------------------------------------------------------------------


def shares_of(pipe: FluxPipeline, **fields: Any) -> dict[int, float | None]:
    """What is known of a picture's calls, by how many there are."""
    job = pipe.prepare(params(**fields))
    encoded = EncodedJob(*pipe.encode_text(job), pipe.encode_references(job))
    call = pipe.denoising(job, 0, encoded).calls()[0]
    return {count: pipe.joint.share(call, count) for count in COUNTS}


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


# --- memory ------------------------------------------------------------------


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


# --- faults ------------------------------------------------------------------


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


# --- several jobs ------------------------------------------------------------


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


def test_a_group_is_queued_ahead_and_waited_for_once_a_step(
    pipe: FluxPipeline, joining: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    joining(pipe)
    pipe.generate(params(n=2, steps=3))
    told = told_ahead(pipe, monkeypatch)
    pipe.generate(params(n=2, steps=3), lambda step, i: told.append(f"shown {i}.{step.index}"))
    assert told == [
        *("begun", "begun", "waited for 1", "shown 0.1", "shown 1.1"),
        *("begun", "waited for 2", "shown 0.2", "shown 1.2"),
        *("waited for 3", "shown 0.3", "shown 1.3"),
    ]
