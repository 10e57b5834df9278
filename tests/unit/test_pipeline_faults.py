"""Broken pictures and full memory: one more try, a clear error, and the next job works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import DeviceFaultError, OutOfMemoryError
from fluxcore.pipeline import ConditioningCache, GenerationResult
from fluxcore.runtime import Runtime

REQUEST = GenerationParams(prompt="a red fox", width=64, height=64, steps=2, seed=7)
WITH_REFERENCE = GenerationParams(
    prompt="a red fox",
    width=64,
    height=64,
    steps=2,
    seed=7,
    references=(Image.linear_gradient("L"),),
)


@pytest.fixture
def pipe(tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> FluxPipeline:
    """The shared model, with an empty cache of its own."""
    monkeypatch.setattr(tiny_pipeline, "conditioning_cache", ConditioningCache(2**28))
    return tiny_pipeline


@contextmanager
def faulty(network: nn.Module, *faults: float | Exception | None) -> Iterator[list[int]]:
    """Whatever a device can do to a network's answers, call by call; after that it is well.

    A number overwrites the answer, an exception is raised. Yields a list that grows with
    every call.
    """
    calls: list[int] = []

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        fault = faults[len(calls)] if len(calls) < len(faults) else None
        calls.append(1)
        if isinstance(fault, Exception):
            raise fault
        return output if fault is None else torch.full_like(output, fault)

    hook = network.register_forward_hook(spoil)
    try:
        yield calls
    finally:
        hook.remove()


def pixels(result: GenerationResult) -> list[bytes]:
    return [image.tobytes() for image in result.images]


@pytest.fixture
def expected(pipe: FluxPipeline) -> list[bytes]:
    found = pixels(pipe.generate(REQUEST))
    pipe.conditioning_cache.clear()
    return found


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), 0.0])
def test_a_broken_picture_is_drawn_once_more(
    pipe: FluxPipeline, expected: list[bytes], fault: float
) -> None:
    with faulty(pipe.vae.decoder, fault) as decodings:
        assert pixels(pipe.generate(REQUEST)) == expected
    assert len(decodings) == 2


def test_a_fault_in_any_network_is_noticed_at_the_end(
    pipe: FluxPipeline, expected: list[bytes]
) -> None:
    for network in (pipe.text_encoder, pipe.transformer, pipe.vae.decoder):
        with faulty(network, float("nan")):
            assert pixels(pipe.generate(REQUEST)) == expected
        pipe.conditioning_cache.clear()
    with faulty(pipe.vae.encoder, float("nan")) as calls:
        found = pixels(pipe.generate(WITH_REFERENCE))
    assert len(calls) == 2
    assert found == pixels(pipe.generate(WITH_REFERENCE))


def test_a_second_fault_is_raised_and_the_next_job_works(
    pipe: FluxPipeline, expected: list[bytes]
) -> None:
    nan = float("nan")
    with faulty(pipe.vae.decoder, nan, nan) as decodings:
        with pytest.raises(DeviceFaultError, match="not finite; try again"):
            pipe.generate(REQUEST)
        assert len(decodings) == 2
        assert pixels(pipe.generate(REQUEST)) == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_both_tries_are_seen_in_the_progress(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Each step once a try, even where the next one is begun before it is shown."""
    monkeypatch.setattr(Runtime, "runs_ahead", ahead)
    with faulty(pipe.vae.decoder, float("nan")):
        told = [(p.stage, p.step) for p in pipe.run(REQUEST)]
    tried = [("denoise", 1), ("denoise", 2)]
    assert told == [("text", 0), *tried, *tried, ("decode", 2)]


def test_what_was_prepared_from_a_fault_is_dropped(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second picture is prepared, from the broken text, before the first is seen to be."""
    request = replace(REQUEST, n=2)
    expected = pixels(pipe.generate(request))
    pipe.conditioning_cache.clear()
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    with faulty(pipe.text_encoder, float("nan")) as calls:
        assert pixels(pipe.generate(request)) == expected
    assert len(calls) == 2


def test_a_queued_step_that_fails_ends_its_job_and_no_other(
    pipe: FluxPipeline, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    velocity_of, calls = pipe._velocity_of, iter((False, True))

    def velocity(*args: torch.Tensor) -> torch.Tensor:
        if next(calls, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: torch.Tensor = velocity_of(*args)
        return found

    monkeypatch.setattr(pipe, "_velocity_of", velocity)
    other = pipe.run(REQUEST)
    told = [next(other).stage]
    with pytest.raises(OutOfMemoryError):
        pipe.generate(REQUEST)
    told += [progress.stage for progress in other]
    assert told == ["text", "denoise", "denoise", "decode"]
    given_up = pipe.run(REQUEST)
    assert [next(given_up).stage for _ in range(2)] == ["text", "denoise"]
    given_up.close()  # with a step queued
    assert pixels(pipe.generate(REQUEST)) == expected


def test_each_picture_has_a_second_try_of_its_own(pipe: FluxPipeline) -> None:
    request = GenerationParams(prompt="a fox", width=64, height=64, steps=1, seed=7, n=2)
    expected = pixels(pipe.generate(request))
    with faulty(pipe.vae.decoder, float("nan"), None, float("nan")) as decodings:
        assert pixels(pipe.generate(request)) == expected
    assert len(decodings) == 4


def test_embeddings_of_a_fault_are_not_kept_for_the_next_job(
    pipe: FluxPipeline, expected: list[bytes]
) -> None:
    nan = float("nan")
    with faulty(pipe.text_encoder, nan, nan) as encodings:
        with pytest.raises(DeviceFaultError):
            pipe.generate(REQUEST)
        assert pixels(pipe.generate(REQUEST)) == expected
    assert len(encodings) == 3


def test_embeddings_that_spoil_in_the_cache_are_made_again(
    pipe: FluxPipeline, expected: list[bytes]
) -> None:
    with torch.inference_mode():
        pipe.encode_prompt(REQUEST.prompt).embeddings.fill_(float("nan"))
    assert pixels(pipe.generate(REQUEST)) == expected
    assert torch.isfinite(pipe.encode_prompt(REQUEST.prompt).embeddings).all()


def test_tables_that_spoil_are_made_again(pipe: FluxPipeline, expected: list[bytes]) -> None:
    with torch.inference_mode():
        pipe.rope_tables.get((4, 4), [])[0].fill_(float("nan"))
    assert pixels(pipe.generate(REQUEST)) == expected
    assert torch.isfinite(pipe.rope_tables.get((4, 4), [])[0]).all()


def test_modulations_that_spoil_are_made_again(pipe: FluxPipeline, expected: list[bytes]) -> None:
    sigmas = pipe.prepare(REQUEST).params.sigmas
    with torch.inference_mode():
        pipe.modulations.get(sigmas, 0)[0].img.fill_(float("nan"))
    assert pixels(pipe.generate(REQUEST)) == expected
    with torch.inference_mode():
        assert torch.isfinite(pipe.modulations.get(sigmas, 0)[0].img).all()


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "encoder", "decoder"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("MPS backend out of memory (MPS allocated: 30.00 GB)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
    ids=["mps", "cuda"],
)
def test_full_memory_is_named_and_the_next_job_works(
    pipe: FluxPipeline, part: str, error: Exception
) -> None:
    network = getattr(pipe if part in ("text_encoder", "transformer") else pipe.vae, part)
    with faulty(network, error) as calls:
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            pipe.generate(WITH_REFERENCE)
        assert len(calls) == 1, "a job that does not fit is not tried again"
        pipe.runtime.release_memory()
        found = pixels(pipe.generate(WITH_REFERENCE))
    assert found == pixels(pipe.generate(WITH_REFERENCE))
    assert not torch.is_inference_mode_enabled()


def test_full_memory_at_a_later_step_ends_the_job(pipe: FluxPipeline) -> None:
    work = pipe.run(REQUEST)
    with faulty(pipe.transformer, None, RuntimeError("Invalid buffer size: 9.00 GB")):
        assert [next(work).stage, next(work).stage] == ["text", "denoise"]
        with pytest.raises(OutOfMemoryError, match="Invalid buffer size"):
            next(work)
    with pytest.raises(StopIteration):
        next(work)


def test_a_fault_of_ours_is_not_dressed_up(pipe: FluxPipeline) -> None:
    mistake = RuntimeError("shapes cannot be multiplied")
    with faulty(pipe.transformer, mistake), pytest.raises(RuntimeError) as caught:
        pipe.generate(REQUEST)
    assert caught.value is mistake


def test_a_disk_that_fails_does_not_take_the_second_try(
    tiny_checkpoint: Path,
    tmp_path: Path,
    expected: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    stored = FluxPipeline.load(
        tiny_checkpoint,
        device="cpu",
        dtype="float32",
        conditioning_store=tmp_path,
        conditioning_store_bytes=2**24,
    )
    stored.generate(REQUEST)
    assert stored.conditioning_store is not None
    stored.conditioning_store.wait()
    monkeypatch.setattr(Path, "unlink", refuse)
    with faulty(stored.vae.decoder, float("nan")) as decodings:
        assert pixels(stored.generate(REQUEST)) == expected
    assert len(decodings) == 2
