"""Filling in what a request leaves open, and saying what has no effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import InvalidParamsError
from fluxcore.pipeline import ModelInfo, PreparedJob
from fluxcore.pipeline.resolve import resolve
from fluxcore.pipeline.schedule import sigmas
from tests.unit.checkpoint_copies import copy_checkpoint, edit_json


@pytest.fixture
def distilled(tiny_pipeline: FluxPipeline) -> ModelInfo:
    return tiny_pipeline.info


@pytest.fixture
def base(distilled: ModelInfo) -> ModelInfo:
    return replace(distilled, is_distilled=False, default_steps=50, default_guidance=4.0)


def job(info: ModelInfo, seed: int = 0, **fields: Any) -> PreparedJob:
    return resolve(GenerationParams(**{"prompt": "a fox", **fields}), info, seed)


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def test_a_distilled_model_draws_512_by_512_in_4_steps_unguided(distilled: ModelInfo) -> None:
    params = job(distilled, seed=9).params
    assert (params.prompt, params.negative_prompt) == ("a fox", None)
    assert (params.width, params.height, params.steps, params.guidance) == (512, 512, 4, None)
    assert (params.seeds, params.start_step, params.schedule) == ((9,), 0, "flux")
    assert params.sigmas == tuple(sigmas("flux", 4, 1024, 2.0))


@pytest.mark.parametrize(
    ("sample_size", "side"), [(1024, 512), (512, 512), (256, 256), (250, 240), (32, 64)]
)
def test_a_model_made_for_small_pictures_draws_those(
    tiny_checkpoint: Path, tmp_path: Path, sample_size: int, side: int
) -> None:
    small = copy_checkpoint(tiny_checkpoint, tmp_path / "small", "vae")
    edit_json(small / "vae" / "config.json", {"sample_size": sample_size})
    info = FluxPipeline.load(small, device="cpu", dtype="float32").info
    params = job(info).params
    assert (params.width, params.height) == (side, side)
    params = job(info, width=640).params
    assert (params.width, params.height) == (640, side)


def test_a_base_model_takes_50_steps_and_guidance_4(base: ModelInfo) -> None:
    params = job(base).params
    assert (params.steps, params.guidance) == (50, 4.0)
    assert len(params.sigmas) == 51


def test_what_is_asked_for_is_not_changed(base: ModelInfo) -> None:
    found = job(
        base, width=2048, height=64, steps=7, guidance=1.5, negative_prompt="fog", schedule="linear"
    )
    params = found.params
    assert (params.width, params.height, params.steps) == (2048, 64, 7)
    assert (params.guidance, params.negative_prompt, params.schedule) == (1.5, "fog", "linear")
    assert params.sigmas == tuple(sigmas("linear", 7, 512, 2.0))
    assert found.warnings == []


def test_power_follows_its_exponent(distilled: ModelInfo) -> None:
    params = job(distilled, schedule="power", power_alpha=3.0, steps=5).params
    assert params.sigmas == tuple(sigmas("power", 5, 1024, 3.0))


def test_every_picture_has_the_next_seed(distilled: ModelInfo) -> None:
    assert job(distilled, seed=40, n=3).params.seeds == (40, 41, 42)


@pytest.mark.parametrize(
    ("reference", "fields", "size"),
    [
        ((200, 120), {}, (192, 112)),
        ((1600, 1200), {}, (1168, 880)),
        ((200, 120), {"width": 256}, (256, 112)),
        ((200, 120), {"height": 256}, (192, 256)),
        ((200, 120), {"width": 64, "height": 80}, (64, 80)),
        ((5600, 700), {"width": 1024}, (1024, 352)),
    ],
)
def test_the_size_follows_the_first_reference_where_it_is_open(
    distilled: ModelInfo, reference: tuple[int, int], fields: dict[str, int], size: tuple[int, int]
) -> None:
    references = (picture(*reference), picture(64, 64))
    params = job(distilled, references=references, **fields).params
    assert (params.width, params.height) == size


@pytest.mark.parametrize(
    ("size", "fitted", "fields"),
    [
        ((5600, 700), "2896x352", {}),
        ((5600, 700), "2896x352", {"height": 64}),
        ((700, 5600), "352x2896", {}),
    ],
)
def test_a_reference_too_long_to_draw_calls_for_a_size(
    distilled: ModelInfo, size: tuple[int, int], fitted: str, fields: dict[str, int]
) -> None:
    with pytest.raises(
        InvalidParamsError, match=f"{fitted}.*at most 2048.*or give width"
    ) as caught:
        job(distilled, references=(picture(*size),), **fields)
    assert caught.value.field == "references[0]"


def test_a_picture_to_paint_in_that_is_too_long_has_no_other_remedy_than_a_crop(
    distilled: ModelInfo,
) -> None:
    with pytest.raises(InvalidParamsError, match="crop it to at most 4:1$"):
        job(distilled, references=(picture(5600, 700),), mask=Image.new("L", (5600, 700)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, None),
        ({"guidance": 0}, None),
        ({"guidance": 1}, None),
        ({"negative_prompt": ""}, None),
        ({"guidance": 1.01}, "guidance has no effect on a distilled model"),
        ({"negative_prompt": "fog"}, "negative_prompt has no effect on a distilled model"),
    ],
)
def test_a_distilled_model_says_what_it_does_not_use(
    distilled: ModelInfo, fields: dict[str, Any], words: str | None
) -> None:
    found = job(distilled, **fields)
    assert found.params.guidance is None
    assert found.warnings == ([] if words is None else [words])


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 1.0])
def test_guidance_of_at_most_1_is_off_on_a_base_model(base: ModelInfo, guidance: float) -> None:
    assert job(base, guidance=guidance).params.guidance is None
    assert job(base, guidance=guidance).warnings == []
    found = job(base, guidance=guidance, negative_prompt="fog")
    assert found.warnings == ["negative_prompt has no effect while guidance is at most 1"]


def test_guidance_and_negative_prompt_of_a_base_model_are_no_reason_to_warn(
    base: ModelInfo,
) -> None:
    found = job(base, guidance=1.01, negative_prompt="fog")
    assert found.params.guidance == 1.01
    assert found.warnings == []


@pytest.mark.parametrize(
    ("size", "warned"),
    [
        ((1792, 1792), False),
        ((2048, 1568), False),
        ((2048, 1584), True),
        ((1808, 1792), True),
        ((2048, 2048), True),
        ((2048, 64), False),
    ],
)
def test_sizes_above_what_the_model_draws_well_are_pointed_out(
    distilled: ModelInfo, size: tuple[int, int], *, warned: bool
) -> None:
    found = job(distilled, width=size[0], height=size[1])
    assert len(found.warnings) == warned
    if warned:
        assert f"{size[0]}x{size[1]} is above 1792x1792" in found.warnings[0]


@given(steps=st.integers(1, 200), strength=st.floats(0.0, 1.0, exclude_min=True))
def test_strength_skips_steps_as_the_reference_does(
    tiny_pipeline: FluxPipeline, steps: int, strength: float
) -> None:
    """Source: Flux2KleinInpaintPipeline.get_timesteps."""
    reference = picture(64, 64)
    fields = {"references": (reference,), "mask": Image.new("L", (64, 64)), "strength": strength}
    skipped = int(max(steps - min(steps * strength, steps), 0))
    try:
        params = job(tiny_pipeline.info, steps=steps, **fields).params
    except InvalidParamsError as error:
        assert skipped == steps
        assert error.field == "strength"
        assert f"of {steps} steps leaves none to run" in error.message
    else:
        assert params.start_step == skipped < steps
        assert len(params.sigmas) == steps + 1


def test_a_strength_that_leaves_no_step_is_refused(distilled: ModelInfo) -> None:
    fields = {"references": (picture(64, 64),), "mask": Image.new("L", (64, 64))}
    with pytest.raises(InvalidParamsError, match="raise one of them"):
        job(distilled, strength=1e-20, **fields)


def test_seeds_are_drawn_where_none_is_given(tiny_pipeline: FluxPipeline) -> None:
    request = GenerationParams(prompt="a fox", n=2)
    seeds = [tiny_pipeline.prepare(request).params.seeds for _ in range(8)]
    assert len(set(seeds)) == 8
    for first, second in seeds:
        assert 0 <= first < 2**32
        assert second == first + 1
    given_seed = GenerationParams(prompt="a fox", seed=0)
    assert tiny_pipeline.prepare(given_seed).params.seeds == (0,)
