"""The Euler loop: levels, guidance, what inpainting keeps, and being abandoned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fluxcore import FluxPipeline
from fluxcore.pipeline.denoise import DenoiseInputs, DenoiseStep, Inpainting, denoise
from fluxcore.pipeline.schedule import sigmas

GRID = (4, 4)
LEVELS = sigmas("flux", 5, 16, 2.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs(tiny_pipeline: FluxPipeline) -> DenoiseInputs:
    return DenoiseInputs(
        noise=random(1, 16, 128),
        modulations=tiny_pipeline.modulations.get(LEVELS, 0),
        references=None,
        positive=random(1, 512, 192, seed=1),
        negative=None,
        guidance=1.0,
        pe=tiny_pipeline.rope_tables.get(GRID, []),
        inpainting=None,
    )


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def run(pipe: FluxPipeline, inputs: DenoiseInputs, start: int = 0) -> list[DenoiseStep]:
    inputs = replace(inputs, modulations=pipe.modulations.get(LEVELS, start))
    return list(denoise(pipe.transformer, inputs, LEVELS, start))


def test_every_step_tells_where_it_stands(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    steps = run(tiny_pipeline, inputs)
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert {step.total for step in steps} == {5}
    assert tuple(step.sigma_before for step in steps) == LEVELS[:-1]
    assert tuple(step.sigma for step in steps) == LEVELS[1:]
    assert torch.equal(steps[0].latents_before, inputs.noise)
    for before, after in itertools.pairwise(steps):
        assert torch.equal(after.latents_before, before.latents)


def test_steps_follow_the_velocity(tiny_pipeline: FluxPipeline, inputs: DenoiseInputs) -> None:
    for step in run(tiny_pipeline, inputs):
        moved = (step.sigma - step.sigma_before) * step.velocity
        assert torch.allclose(step.latents, step.latents_before + moved, atol=1e-6)
        assert step.velocity.abs().mean() > 0.01


def test_the_clean_latents_that_a_step_sees_coming(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    steps = run(tiny_pipeline, inputs)
    for step in steps:
        rest = step.latents - step.sigma * step.velocity
        assert torch.allclose(step.predicted_clean(), rest, atol=1e-5)
    assert torch.allclose(steps[-1].predicted_clean(), steps[-1].latents, atol=1e-6)
    assert not torch.allclose(steps[0].predicted_clean(), steps[-1].latents, atol=1e-2)


def test_guidance_leads_away_from_the_negative(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    """v = v_negative + g (v_positive - v_negative)."""
    other = random(1, 512, 192, seed=2)
    positive = run(tiny_pipeline, inputs)[0].velocity
    negative = run(tiny_pipeline, replace(inputs, positive=other))[0].velocity
    guided = run(tiny_pipeline, replace(inputs, negative=other, guidance=3.0))[0].velocity
    assert torch.allclose(guided, negative + 3.0 * (positive - negative), atol=1e-5)
    assert not torch.allclose(positive, negative, atol=1e-2)


def test_the_same_negative_as_positive_changes_nothing(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    alone = run(tiny_pipeline, inputs)[-1].latents
    guided = run(tiny_pipeline, replace(inputs, negative=inputs.positive, guidance=7.0))[-1].latents
    assert torch.allclose(alone, guided, atol=1e-5)


@pytest.mark.parametrize("prompts", [1, 2], ids=["plain", "guided"])
def test_each_prompt_is_projected_once_a_picture(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs, prompts: int
) -> None:
    """And the velocity is that of the projection made anew in each step."""
    transformer, seen = tiny_pipeline.transformer, []
    if prompts == 2:
        inputs = replace(inputs, negative=random(1, 512, 192, seed=2), guidance=3.0)
    hook = transformer.txt_in.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    steps = run(tiny_pipeline, inputs)
    hook.remove()
    given = [inputs.positive, inputs.negative][:prompts]
    assert len(seen) == prompts and all(a is b for a, b in zip(seen, given, strict=True))
    modulations = transformer.modulation(torch.tensor(LEVELS[:-1]))
    for step, modulation in zip(steps, modulations, strict=True):
        velocities = [
            transformer(
                step.latents_before, transformer.text_tokens(text), modulation, inputs.pe, 16
            )
            for text in seen
        ]
        expected = velocities[-1]
        if prompts == 2:
            expected = expected + inputs.guidance * (velocities[0] - expected)
        assert torch.equal(step.velocity, expected)


def test_references_are_seen_and_never_moved(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    pe = tiny_pipeline.rope_tables.get(GRID, [(2, 3)])
    with_reference = replace(inputs, references=random(1, 6, 128, seed=3), pe=pe)
    steps = run(tiny_pipeline, with_reference)
    assert {step.latents.shape for step in steps} == {(1, 16, 128)}
    assert not torch.allclose(steps[-1].latents, run(tiny_pipeline, inputs)[-1].latents, atol=1e-2)


def test_the_loop_computes_no_further_than_it_is_asked(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    calls: list[int] = []
    hook = tiny_pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    loop = denoise(tiny_pipeline.transformer, inputs, LEVELS, 0)
    assert calls == []
    next(loop)
    next(loop)
    loop.close()  # type: ignore[attr-defined]
    assert len(calls) == 2
    assert list(loop) == []
    hook.remove()


@pytest.mark.parametrize("start", [0, 2])
def test_what_is_not_masked_is_the_picture_at_the_step_s_level(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs, start: int
) -> None:
    picture = random(1, 16, 128, seed=4)
    mask = torch.zeros(1, 16, 1)
    mask[:, 8:] = 1
    painted = replace(inputs, inpainting=Inpainting(picture, inputs.noise, mask))
    steps = run(tiny_pipeline, painted, start)
    assert [step.index for step in steps] == list(range(start + 1, 6))
    level = LEVELS[start]
    expected = level * inputs.noise + (1 - level) * picture
    assert torch.allclose(steps[0].latents_before, expected, atol=1e-6)
    for step in steps:
        kept = step.sigma * inputs.noise + (1 - step.sigma) * picture
        assert torch.allclose(step.latents[:, :8], kept[:, :8], atol=1e-6)
        assert not torch.allclose(step.latents[:, 8:], kept[:, 8:], atol=1e-2)
    assert torch.equal(steps[-1].latents[:, :8], picture[:, :8])


def test_a_token_masked_in_part_is_mixed(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    picture = random(1, 16, 128, seed=4)
    half = Inpainting(picture, inputs.noise, torch.full((1, 16, 1), 0.25))
    step = run(tiny_pipeline, replace(inputs, inpainting=half))[-1]
    free = step.latents_before + (step.sigma - step.sigma_before) * step.velocity
    assert torch.allclose(step.latents, 0.75 * picture + 0.25 * free, atol=1e-5)


def test_a_mask_of_ones_is_drawing_from_scratch(
    tiny_pipeline: FluxPipeline, inputs: DenoiseInputs
) -> None:
    whole = Inpainting(random(1, 16, 128, seed=4), inputs.noise, torch.ones(1, 16, 1))
    painted = run(tiny_pipeline, replace(inputs, inpainting=whole))[-1].latents
    assert torch.allclose(painted, run(tiny_pipeline, inputs)[-1].latents, atol=1e-6)
