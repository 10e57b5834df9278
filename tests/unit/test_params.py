"""Every limit of a request, at, below and above its bound, and what the refusal says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from PIL import Image

from fluxcore.errors import FluxError, InvalidParamsError
from fluxcore.params import MAX_PROMPT_CHARS, MAX_SEED, GenerationParams, check_side

NAN, INFINITY = float("nan"), float("inf")
PICTURE = Image.new("RGB", (96, 64))


def refusal(**fields: Any) -> InvalidParamsError:
    with pytest.raises(InvalidParamsError) as caught:
        GenerationParams(**{"prompt": "a fox", **fields})
    assert str(caught.value) == caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "x"),
        ("prompt", "x" * MAX_PROMPT_CHARS),
        ("negative_prompt", ""),
        ("negative_prompt", "x" * MAX_PROMPT_CHARS),
        ("width", 64),
        ("width", 80),
        ("height", 2032),
        ("height", 2048),
        ("steps", 1),
        ("steps", 200),
        ("guidance", 0),
        ("guidance", 30.0),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("n", 1),
        ("n", 10),
        ("schedule", "flux"),
        ("schedule", "linear"),
        ("schedule", "power"),
        ("power_alpha", 1e-9),
        ("power_alpha", 10),
        ("references", ()),
        ("references", (PICTURE,) * 10),
        ("references", (Image.new("RGB", (64, 512)),)),
        ("references", (Image.new("RGB", (512, 64)),)),
    ],
)
def test_values_at_the_bounds_are_taken(field: str, value: Any) -> None:
    params = GenerationParams(**{"prompt": "a fox", field: value})
    assert getattr(params, field) == value


@pytest.mark.parametrize("strength", [1e-9, 0.5, 1, 1.0])
def test_strengths_within_bounds_are_taken_with_a_mask(strength: float) -> None:
    mask = Image.new("L", PICTURE.size)
    params = GenerationParams(prompt="a", references=(PICTURE,), mask=mask, strength=strength)
    assert params.strength == strength


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "", ["must not be empty"]),
        ("prompt", " \n\t\u3000", ["must not be empty"]),
        ("prompt", "\x1c\x1f\x85\ufeff", ["must not be empty"]),
        ("prompt", None, ["must be text", "NoneType"]),
        ("prompt", b"fox", ["must be text", "bytes"]),
        ("prompt", "x" * (MAX_PROMPT_CHARS + 1), ["at most 32000", "got 32001"]),
        ("prompt", "a \udcff star", ["valid Unicode", "character 2"]),
        ("negative_prompt", "\ud83d", ["valid Unicode", "character 0"]),
        ("negative_prompt", 7, ["must be text", "int"]),
        ("negative_prompt", "x" * (MAX_PROMPT_CHARS + 1), ["at most 32000", "got 32001"]),
        ("width", 48, ["multiple of 16 from 64 to 2048", "got 48", "nearest: 64)"]),
        ("width", 63, ["got 63", "nearest: 64)"]),
        ("width", 500, ["got 500", "nearest: 496, 512)"]),
        ("width", 2047, ["got 2047", "nearest: 2032, 2048)"]),
        ("width", 2064, ["got 2064", "nearest: 2048)"]),
        ("width", 100_000, ["got 100000", "nearest: 2048)"]),
        pytest.param("width", 10**400, ["from 64 to 2048"], id="width-huge"),
        ("width", 0, ["got 0", "nearest: 64)"]),
        ("width", -512, ["got -512", "nearest: 64)"]),
        ("width", 512.0, ["must be an integer", "got 512.0"]),
        ("width", "512", ["must be an integer", "got '512'"]),
        ("height", True, ["must be an integer", "got True"]),
        ("height", 65, ["multiple of 16", "got 65", "nearest: 64, 80)"]),
        ("steps", 0, ["from 1 to 200", "got 0"]),
        ("steps", 201, ["from 1 to 200", "got 201"]),
        ("steps", True, ["must be an integer", "got True"]),
        ("steps", 4.0, ["must be an integer", "got 4.0"]),
        ("guidance", -0.001, ["from 0 to 30", "got -0.001"]),
        ("guidance", 30.001, ["from 0 to 30", "got 30.001"]),
        ("guidance", NAN, ["finite number", "got nan"]),
        ("guidance", INFINITY, ["finite number", "got inf"]),
        ("guidance", -INFINITY, ["finite number", "got -inf"]),
        pytest.param("guidance", 10**400, ["from 0 to 30"], id="guidance-huge"),
        ("guidance", True, ["finite number", "got True"]),
        ("guidance", "4", ["finite number", "got '4'"]),
        ("seed", -1, [f"from 0 to {MAX_SEED}", "got -1"]),
        ("seed", MAX_SEED + 1, [f"from 0 to {MAX_SEED}", f"got {MAX_SEED + 1}"]),
        ("seed", 1.0, ["must be an integer", "got 1.0"]),
        ("seed", False, ["must be an integer", "got False"]),
        ("n", 0, ["from 1 to 10", "got 0"]),
        ("n", 11, ["from 1 to 10", "got 11"]),
        ("n", True, ["must be an integer", "got True"]),
        ("n", None, ["must be an integer", "got None"]),
        ("schedule", "cosine", ["flux, linear, power", "got 'cosine'"]),
        ("schedule", None, ["flux, linear, power", "got None"]),
        ("schedule", ["flux"], ["flux, linear, power"]),
        ("power_alpha", 0, ["above 0 to 10", "got 0"]),
        ("power_alpha", -1.0, ["above 0 to 10", "got -1"]),
        ("power_alpha", 10.001, ["above 0 to 10", "got 10.001"]),
        ("power_alpha", NAN, ["finite number", "got nan"]),
        ("power_alpha", None, ["finite number", "got None"]),
        ("strength", 0.0, ["above 0 to 1", "got 0"]),
        ("strength", 1.001, ["above 0 to 1", "got 1.001"]),
        ("strength", NAN, ["finite number", "got nan"]),
        ("strength", None, ["finite number", "got None"]),
        ("strength", 0.5, ["inpainting only", "mask"]),
        ("references", PICTURE, ["PIL images"]),
        ("references", ("fox.png",), ["PIL images"]),
        ("references", (PICTURE, None), ["PIL images"]),
        ("references", None, ["PIL images"]),
        ("references", (PICTURE,) * 11, ["at most 10", "got 11"]),
        ("references", (Image.new("RGB", (63, 64)),), ["references[0]", "64 pixels", "got 63x64"]),
        ("references", (PICTURE, Image.new("L", (64, 63))), ["references[1]", "got 64x63"]),
        ("references", (Image.new("L", (64, 513)),), ["at most 8:1", "got 64x513"]),
        ("references", (Image.new("L", (513, 64)),), ["at most 8:1", "got 513x64"]),
        ("references", (Image.new("L", (0, 64)),), ["64 pixels", "got 0x64"]),
        ("mask", PICTURE, ["needs a picture", "first reference"]),
        ("mask", b"PNG", ["PIL images"]),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(field: str, value: Any, words: list[str]) -> None:
    error = refusal(**{field: value})
    assert error.field.partition("[")[0] == field
    for word in words:
        assert word in error.message


def test_a_seed_must_leave_room_for_all_pictures() -> None:
    assert GenerationParams(prompt="a", seed=MAX_SEED - 9, n=10).seed == MAX_SEED - 9
    error = refusal(seed=MAX_SEED - 8, n=10)
    assert error.field == "seed"
    assert f"from 0 to {MAX_SEED - 9}" in error.message


def test_a_mask_has_the_size_of_the_first_reference() -> None:
    other = Image.new("RGB", (128, 128))
    mask = Image.new("L", PICTURE.size)
    assert GenerationParams(prompt="a", references=(PICTURE, other), mask=mask).mask is mask
    error = refusal(references=(other, PICTURE), mask=mask)
    assert error.field == "mask"
    assert "128x128; got 96x64" in error.message


@pytest.mark.parametrize("field", ["width", "height"])
def test_a_mask_leaves_no_choice_of_size(field: str) -> None:
    error = refusal(references=(PICTURE,), mask=Image.new("L", PICTURE.size), **{field: 64})
    assert error.field == field
    assert "leave them out" in error.message


def test_an_invalid_request_is_both_a_flux_error_and_a_value_error() -> None:
    error = refusal(steps=0)
    assert isinstance(error, FluxError)
    assert isinstance(error, ValueError)


def test_a_request_cannot_be_changed_once_checked() -> None:
    with pytest.raises(FrozenInstanceError):
        GenerationParams(prompt="a").steps = 0  # type: ignore[misc]


def test_the_summary_holds_all_but_the_pictures() -> None:
    params = GenerationParams(prompt="a", references=(PICTURE,), steps=3, seed=5)
    summary = params.summary()
    assert summary["prompt"] == "a"
    assert summary["steps"] == 3
    assert "references" not in summary
    assert "mask" not in summary
    assert GenerationParams(**summary, references=(PICTURE,)) == params


def test_every_refused_side_is_told_sides_that_are_taken() -> None:
    taken = range(64, 2049, 16)
    for value in range(2200):
        if value in taken:
            check_side("width", value)
            continue
        with pytest.raises(InvalidParamsError) as caught:
            check_side("width", value)
        near = [int(x) for x in caught.value.message.split("nearest: ")[1].rstrip(")").split(", ")]
        assert set(near) <= set(taken)
        nearest = min(abs(value - side) for side in taken)
        assert min(abs(value - side) for side in near) == nearest
