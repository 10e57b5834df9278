"""A job that is begun behind another's end: the same pictures, and nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import OutOfMemoryError
from fluxcore.pipeline import ConditioningCache, GenerationResult
from fluxcore.pipeline.encoded import NO_REFERENCES, EncodedJob
from fluxcore.pipeline.joint_steps import JointSteps
from fluxcore.pipeline.run import QUICK_CHARS, Run
from fluxcore.runtime import Runtime
from fluxcore.runtime.graphs import Graphs
from tests.unit.running_ahead import told_ahead
from tests.unit.test_pipeline import LONG, finish, painting, params, pixels
from tests.unit.test_pipeline_faults import faulty

NAN = float("nan")


@pytest.fixture
def pipe(tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> FluxPipeline:
    """The shared model on a device that runs ahead, with an empty cache of its own."""
    monkeypatch.setattr(tiny_pipeline, "conditioning_cache", ConditioningCache(2**28))
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    monkeypatch.setattr(Runtime, "has_recorded", lambda *_: True)
    return tiny_pipeline


@pytest.fixture
def told(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the device, and on whom the host waits."""
    told = told_ahead(pipe, monkeypatch)
    embeddings_of = pipe._embeddings_of

    def encoded(*args: Any) -> Tensor:
        told.append("text")
        return embeddings_of(*args)

    def begin_to_host(_: Runtime, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        def wait() -> list[Tensor]:
            told.append("waited for a picture")
            return list(tensors)

        return wait

    monkeypatch.setattr(pipe, "_embeddings_of", encoded)
    monkeypatch.setattr(Runtime, "begin_to_host", begin_to_host)
    return told


def finished(run: Run) -> GenerationResult:
    return finish(run)  # type: ignore[arg-type]


def to_its_end(run: Run) -> Run:
    """Run it until only its last decoding is left, which is queued."""
    queued: list[bool] = []
    run.meanwhile(lambda: queued.append(True))
    while not queued:
        next(run)
    return run


def fields(result: GenerationResult) -> tuple[Any, ...]:
    return (
        pixels(result),
        *(result.seeds, result.params, result.warnings),
        *(result.cache_hit, result.prompt_tokens, list(result.timings)),
    )


@pytest.mark.parametrize(
    "asked",
    [
        params("a blue star"),
        params("a blue star", n=2),
        params("a blue star", references=(painting(64, 64),)),
        params(LONG),
        params("a red fox", seed=8),
    ],
    ids=["plain", "two", "reference", "cut", "cached"],
)
def test_it_draws_and_tells_the_same(pipe: FluxPipeline, asked: GenerationParams) -> None:
    first = params("a red fox")
    expected = [fields(finished(pipe.run(one))) for one in (first, asked)]
    pipe.conditioning_cache.clear()
    ending = to_its_end(pipe.run(first))
    ahead = pipe.run(asked)
    ahead.begin()
    assert [fields(finished(ending)), fields(finished(ahead))] == expected


@pytest.mark.parametrize("alone", [False, True])
def test_with_guidance_both_prompts_are_begun(
    tiny_base_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    base = FluxPipeline.load(tiny_base_checkpoint, device="cpu", dtype="float32")
    asked = params("a fox", guidance=3.0, negative_prompt=LONG)
    expected = fields(finished(base.run(asked)))
    base.conditioning_cache.clear()
    monkeypatch.setattr(Runtime, "has_recorded", lambda *_: True)
    with faulty(base.text_encoder) as encodings, faulty(base.transformer) as steps:
        ahead = base.run(asked, alone=alone)
        ahead.begin()
        assert (len(encodings), len(steps)) == (2, 0), "no step, of which there are two kinds"
        assert fields(finished(ahead)) == expected
        assert len(encodings) == 2


def test_the_next_prompt_is_queued_before_the_last_picture_is_waited_for(
    pipe: FluxPipeline, told: list[str]
) -> None:
    ending, ahead = pipe.run(params("a red fox")), pipe.run(params("a blue star"))
    ending.meanwhile(ahead.begin)
    result = finished(ending)
    assert told[-6:] == [
        *("decoding", "text", "prepared", "begun"),
        *("waited for 3", "waited for a picture"),
    ]
    told.clear()
    ahead.begin()
    assert not told, "it is begun twice"
    next(ahead)
    assert told == ["waited for 4"]
    finished(ahead)
    assert "text" not in told and "prepared" not in told
    assert told.count("begun") == 1, "of two steps"
    assert list(result.timings) == ["text", "denoise", "decode", "total"]


@pytest.mark.parametrize(
    "asked",
    [
        params("a" * (QUICK_CHARS + 1)),
        params("a star", negative_prompt="a" * QUICK_CHARS),
    ],
    ids=["long", "long together"],
)
def test_what_would_delay_the_other_s_answer_waits_for_its_turn(
    pipe: FluxPipeline, told: list[str], asked: GenerationParams
) -> None:
    ending = to_its_end(pipe.run(params("a red fox")))
    told.clear()
    ahead = pipe.run(asked)
    ahead.begin()
    assert not told
    finished(ending)
    finished(ahead)


@pytest.mark.parametrize(
    ("asked", "share", "begun"),
    [
        (params("a red fox", seed=8), 1.0, ["prepared", "begun"]),
        (params("a red fox", seed=8), 0.5, ["prepared"]),
        (params("a blue star"), 1.0, ["text", "prepared", "begun"]),
        (params("a blue star", n=2), 1.0, ["text", "prepared"]),
        (params("a blue star", width=80), 1.0, ["text"]),
        (params("a blue star", references=(painting(64, 64),)), 1.0, ["text"]),
    ],
    ids=["known", "may be joined", "new", "two", "large", "reference"],
)
def test_what_is_queued_behind_the_prompt(
    pipe: FluxPipeline,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    asked: GenerationParams,
    share: float,
    begun: list[str],
) -> None:
    monkeypatch.setattr("fluxcore.pipeline.run.QUICK_PIXELS", 64 * 64)
    monkeypatch.setattr(JointSteps, "share", lambda *_: share)
    ending = to_its_end(pipe.run(params("a red fox")))
    ahead = pipe.run(asked)
    told.clear()
    for _ in range(2):
        ahead.begin()
        assert told == begun, "once"
    finished(ending)
    told.clear()
    finished(ahead)
    assert "text" not in told


def test_no_step_that_has_to_be_recorded_is_queued_while_somebody_waits(
    pipe: FluxPipeline, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "has_recorded", lambda *_: False)
    ending = to_its_end(pipe.run(params("a red fox")))
    ahead = pipe.run(params("a blue star"))
    told.clear()
    ahead.begin()
    assert told == ["text", "prepared"]
    finished(ending)
    told.clear()
    next(ahead)
    assert told[0] == "begun", "in its turn, and before its text is waited for"
    finished(ahead)
    assert "prepared" not in told


def test_what_would_be_played_is_asked_of_the_steps_own_recordings(
    tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return function(), lambda: None

    runtime = replace(tiny_pipeline.runtime, graphs=Graphs(2, record))
    monkeypatch.setattr(tiny_pipeline, "runtime", runtime)
    step = runtime.graphed(tiny_pipeline.transformer, 4096)
    job = tiny_pipeline.prepare(params())
    encoded = EncodedJob(*tiny_pipeline.encode_text(job), NO_REFERENCES)
    with torch.inference_mode():
        (call,) = tiny_pipeline.denoising(job, 0, encoded).calls()
        assert not tiny_pipeline.is_recorded(call)
        step(*call)
    assert tiny_pipeline.is_recorded(call)
    assert not tiny_pipeline.is_recorded(call._replace(img=call.img[:, 1:]))


def test_other_work_is_done_once_all_of_the_job_is_queued(pipe: FluxPipeline) -> None:
    told: list[str] = []
    run = pipe.run(params(n=2))
    run.meanwhile(lambda: told.append("meanwhile"))
    told.extend(done.stage for done in run)
    image = ["denoise", "denoise", "decode"]
    assert told == ["text", *image, "denoise", "meanwhile", "denoise", "decode"]


def test_jobs_begin_ahead_only_where_that_waits_for_nothing(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipe.begins_ahead
    monkeypatch.setattr(pipe, "runtime", replace(pipe.runtime, residency="balanced"))
    assert not pipe.begins_ahead, "the encoder's layers come from the host"
    monkeypatch.undo()
    assert not pipe.begins_ahead


@pytest.mark.parametrize("alone", [False, True])
def test_a_prompt_of_before_a_fault_is_encoded_anew(pipe: FluxPipeline, alone: bool) -> None:
    """Not only at the second try: what was prepared and begun from it goes, too."""
    expected = pixels(pipe.generate(params("a blue star")))
    pipe.conditioning_cache.clear()
    ahead = pipe.run(params("a blue star"), alone=alone)
    with faulty(pipe.text_encoder, NAN):
        ahead.begin()
    pipe.forget()
    with faulty(pipe.text_encoder) as encodings, faulty(pipe.vae.decoder) as decodings:
        told: list[tuple[str, int]] = []
        told.extend((done.stage, done.step) for done in islice(ahead, 3))
        assert pixels(finished(ahead)) == expected
    assert told == [("text", 0), ("denoise", 1), ("denoise", 2)]
    assert (len(encodings), len(decodings)) == (1, 1)


def test_what_was_prepared_before_a_fault_goes_where_the_prompt_is_known_again(
    pipe: FluxPipeline,
) -> None:
    expected = pixels(pipe.generate(params("a blue star")))
    pipe.conditioning_cache.clear()
    ahead = pipe.run(params("a blue star"))
    with faulty(pipe.text_encoder, NAN):
        ahead.begin()
    pipe.forget()
    pipe.generate(params("a blue star", seed=8))
    with faulty(pipe.vae.decoder) as decodings:
        result = finished(ahead)
    assert pixels(result) == expected and result.cache_hit
    assert len(decodings) == 1


@pytest.mark.parametrize("is_faulty", [False, True])
def test_no_trial_is_made_with_what_was_begun_before_a_fault(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, is_faulty: bool
) -> None:
    """Joined rows that are no numbers differ from themselves, and the size would go alone."""
    monkeypatch.setattr(pipe, "joint", JointSteps(by_rows(pipe), pipe.runtime, "exact"))
    monkeypatch.setattr(JointSteps, "_took_s", lambda _, work, tries=3: (work(), 0.01)[1])
    ahead = pipe.run(params("a blue star"))
    with faulty(pipe.text_encoder, NAN) if is_faulty else nullcontext():
        ahead.begin()
    if is_faulty:
        pipe.forget()
    next(ahead)
    assert pipe.share(ahead, 2) == 0.5
    ahead.close()


def by_rows(pipe: FluxPipeline) -> Callable[..., Tensor]:
    """Steps whose rows do not depend on each other."""

    def velocities(img: Tensor, txt: Tensor, *shared: Any) -> Tensor:
        rows = zip(img.split(1), txt.split(1), strict=True)
        return torch.cat([pipe.transformer(*row, *shared) for row in rows])

    return velocities


def test_a_fault_in_the_ending_picture_reaches_neither(pipe: FluxPipeline) -> None:
    asked = [params("a red fox"), params("a blue star")]
    expected = [pixels(pipe.generate(one)) for one in asked]
    pipe.conditioning_cache.clear()
    with faulty(pipe.vae.decoder, NAN) as decodings, faulty(pipe.text_encoder) as encodings:
        ending, ahead = (pipe.run(one) for one in asked)
        ending.meanwhile(ahead.begin)
        assert [pixels(finished(run)) for run in (ending, ahead)] == expected
    # Each prompt twice; the second one's again as it is begun behind the second try.
    assert (len(decodings), len(encodings)) == (3, 4)


def test_the_peak_of_the_picture_in_hand_is_measured_on(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[int] = []
    monkeypatch.setattr(Runtime, "reset_peak", lambda _: resets.append(1))
    ahead = pipe.run(params())
    ahead.begin()
    assert not resets
    finished(ahead)
    assert len(resets) == 1


def test_its_times_leave_out_what_lies_before_its_first_slice(pipe: FluxPipeline) -> None:
    ahead, began_s = pipe.run(params()), time.perf_counter()
    ahead.begin()
    own_s = time.perf_counter() - began_s
    time.sleep(0.2)
    began_s = time.perf_counter()
    result = finished(ahead)
    own_s += time.perf_counter() - began_s
    assert 0 < result.timings["text"] < result.timings["total"] <= own_s * 1000


def test_one_that_does_not_fit_can_be_given_up_and_begun_later(pipe: FluxPipeline) -> None:
    expected = pixels(pipe.generate(params()))
    pipe.conditioning_cache.clear()
    with faulty(pipe.text_encoder, torch.OutOfMemoryError("CUDA out of memory")):
        ahead = pipe.run(params())
        with pytest.raises(OutOfMemoryError):
            ahead.begin()
        ahead.close()
        assert pixels(pipe.generate(params())) == expected
    assert not torch.is_inference_mode_enabled()


def test_one_whose_first_step_does_not_fit_takes_it_in_its_turn(
    pipe: FluxPipeline, told: list[str]
) -> None:
    expected = pixels(pipe.generate(params()))
    pipe.conditioning_cache.clear()
    told.clear()
    with faulty(pipe.transformer, torch.OutOfMemoryError("CUDA out of memory")):
        ahead = pipe.run(params())
        with pytest.raises(OutOfMemoryError):
            ahead.begin()
    assert pixels(finished(ahead)) == expected
    assert told.count("prepared") == 1


def test_one_that_is_given_up_holds_nothing(pipe: FluxPipeline) -> None:
    ahead = pipe.run(params())
    ahead.begin()
    assert ahead._text is not None and ahead._pictures and ahead.begun
    ahead.close()
    assert [ahead._next, ahead._like, ahead._text, ahead._encoded] == [None] * 4
    assert not ahead._pictures and not ahead.begun
    with pytest.raises(StopIteration):
        next(ahead)
