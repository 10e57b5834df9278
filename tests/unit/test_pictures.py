"""Pictures in and out: references, masks, 8-bit rounding, and pictures that are none."""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import DeviceFaultError
from fluxcore.fitting import LARGEST_REFERENCE_AREA, fitted_size
from fluxcore.pipeline import pictures
from fluxcore.pipeline.pictures import (
    fit_inpainted,
    fit_reference,
    opaque,
    to_bytes,
    to_picture,
    to_pixels,
    to_token_mask,
)
from fluxcore.residues import SAMPLED, filtered, strip_height
from fluxcore.runtime import Runtime

ASKED = GenerationParams(prompt="a red fox", width=96, height=64, steps=2, seed=7, n=2)
PROCESSOR = Flux2ImageProcessor(vae_scale_factor=16)


def noise_picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def through_png(picture: Image.Image) -> Image.Image:
    """What a user's upload is after reading it."""
    stream = BytesIO()
    picture.save(stream, "PNG")
    return Image.open(BytesIO(stream.getvalue()))


def shown(pixels: torch.Tensor) -> Image.Image:
    """Decoded pixels as the picture that a caller gets."""
    return to_picture(*to_bytes(pixels)).image


def corner(picture: Image.Image) -> object:
    return picture.getpixel((0, 0))


@given(width=st.integers(64, 4000), height=st.integers(64, 4000))
def test_sizes_are_limited_in_area_and_whole_in_tokens(width: int, height: int) -> None:
    """Equal to the reference's resize and crop, without doing either."""
    long, short = max(width, height), min(width, height)
    if long > 8 * short:
        return
    picture = Image.new("1", (width, height))
    fitted = fitted_size(picture)
    assert fitted[0] % 16 == fitted[1] % 16 == 0
    assert fitted[0] * fitted[1] <= LARGEST_REFERENCE_AREA
    limited = PROCESSOR._resize_if_exceeds_area(picture).size
    assert fitted == (limited[0] // 16 * 16, limited[1] // 16 * 16)
    assert min(fitted) >= 64


@pytest.mark.parametrize("size", [(64, 64), (100, 79), (1024, 1024), (1040, 1024), (1600, 1201)])
def test_references_equal_the_reference_s_own_preparation(size: tuple[int, int]) -> None:
    """Source: Flux2KleinPipeline.__call__."""
    picture = noise_picture(*size)
    limited = PROCESSOR._resize_if_exceeds_area(picture)
    width, height = limited.width // 16 * 16, limited.height // 16 * 16
    expected = PROCESSOR.preprocess(limited, height=height, width=width, resize_mode="crop")
    fitted = fit_reference(picture)
    assert fitted.size == fitted_size(picture) == (width, height)
    assert torch.equal(to_pixels(fitted), expected)


def test_references_are_cropped_at_the_centre() -> None:
    picture = noise_picture(75, 90)
    fitted = np.asarray(fit_reference(picture))
    assert np.array_equal(fitted, np.asarray(picture)[5:85, 5:69])


def test_a_picture_to_paint_in_is_stretched_not_cropped() -> None:
    picture = Image.new("RGB", (100, 79), "black")
    picture.paste("white", (92, 0, 100, 79))  # would be cut off by a crop to 96
    fitted = fit_inpainted(picture)
    assert fitted.size == fitted_size(picture) == (96, 64)
    assert fitted.getpixel((95, 32)) == (255, 255, 255)
    assert fitted.getpixel((80, 32)) == (0, 0, 0)


@given(values=st.lists(st.integers(0, 255), min_size=3, max_size=3))
def test_pixels_lie_between_minus_1_and_1(values: list[int]) -> None:
    picture = Image.new("RGB", (4, 2), tuple(values))
    pixels = to_pixels(picture)
    assert pixels.shape == (1, 3, 2, 4)
    assert pixels.dtype == torch.float32
    expected = np.float32(values) / np.float32(255) * 2 - 1
    assert np.array_equal(pixels[0, :, 1, 3].numpy(), expected)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert corner(opaque(clear)) == (255, 255, 255)
    assert corner(opaque(half)) == (127, 127, 127)
    assert corner(opaque(Image.new("RGBA", (4, 4), (200, 10, 10, 255)))) == (200, 10, 10)
    assert corner(opaque(Image.new("LA", (4, 4), (7, 0)))) == (255, 255, 255)
    assert corner(opaque(Image.new("LA", (4, 4), (7, 255)))) == (7, 7, 7)


def test_a_transparent_colour_becomes_white_in_every_kind_of_png() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 10, 10, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    for picture in (palette, Image.new("RGB", (4, 4), (200, 10, 10)), Image.new("L", (4, 4), 9)):
        stream = BytesIO()
        key = {"P": 0, "RGB": (200, 10, 10), "L": 9}[picture.mode]
        picture.save(stream, "PNG", transparency=key)
        shown = opaque(Image.open(BytesIO(stream.getvalue())))
        assert shown.mode == "RGB"
        assert corner(shown) == (255, 255, 255), picture.mode
    palette.info.pop("transparency")
    assert corner(opaque(palette)) == (200, 10, 10)
    assert opaque(palette).getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 100, (100, 100, 100)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 0, 77), (77, 77, 77)),
    ],
)
def test_every_colour_space_becomes_rgb(
    mode: str, colour: object, expected: tuple[int, int, int]
) -> None:
    shown = opaque(Image.new(mode, (4, 4), colour))  # type: ignore[arg-type]
    assert shown.mode == "RGB"
    assert corner(shown) == expected


@pytest.mark.parametrize("value", [0, 1, 127, 128, 200, 255])
def test_sixteen_bits_are_scaled_and_not_clipped(value: int) -> None:
    wide = Image.fromarray(np.full((64, 64), value * 257, dtype=np.uint16))
    for picture in (wide, through_png(wide)):
        assert picture.mode == "I;16"
        assert corner(opaque(picture)) == (value,) * 3
        share = to_token_mask(picture, (64, 64))
        assert share.unique().tolist() == [1.0 if value >= 128 else 0.0]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_a_mask_may_be_of_any_mode(mode: str) -> None:
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 32, 32))
    share = to_token_mask(mask.convert(mode), (64, 32))
    assert share.shape == (1, 8, 1)
    assert share.flatten().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_a_mask_is_cut_at_half_brightness() -> None:
    for value, drawn in ((0, 0.0), (127, 0.0), (128, 1.0), (255, 1.0)):
        mask = Image.new("L", (64, 64), value)
        assert to_token_mask(mask, (64, 64)).unique().tolist() == [drawn]


def test_a_mask_equals_the_reference_s_preparation() -> None:
    """Source: Flux2KleinInpaintPipeline (mask_processor and prepare_mask_latents)."""
    processor = Flux2ImageProcessor(
        vae_scale_factor=16,
        do_normalize=False,
        do_binarize=True,
        do_convert_rgb=False,
        do_convert_grayscale=True,
    )
    mask = noise_picture(15, 10).convert("L").resize((151, 101), Image.Resampling.BICUBIC)
    expected = processor.preprocess(mask, height=96, width=144)
    expected = torch.nn.functional.interpolate(expected, size=(6, 9), mode="bilinear")
    share = to_token_mask(mask, (144, 96))
    assert torch.equal(share, expected.flatten(2).transpose(1, 2))
    assert len(share.unique()) > 2, "the mask has tokens that are drawn in part"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_8_bits_equals_the_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(1, 3, 48, 32, generator=generator) * 0.7).to(dtype)
    expected = PROCESSOR.postprocess(pixels, output_type="pil")[0]
    found = shown(pixels)
    assert found.size == (32, 48)
    assert found.mode == "RGB"
    assert found.tobytes() == expected.tobytes()


@given(level=st.floats(-1.5, 1.5, width=32))
def test_every_level_rounds_to_the_nearest_byte(level: float) -> None:
    pixels = torch.full((1, 3, 2, 2), level)
    pixels[0, 0, 1, 1] = 0.3  # a constant picture is refused
    byte = shown(pixels).getpixel((0, 0))[2]  # type: ignore[index]
    exact = min(max((level + 1) / 2 * 255, 0), 255)
    assert abs(byte - exact) <= 0.5 + 1e-4


@given(values=st.lists(st.integers(0, 255), min_size=12, max_size=12))
def test_a_picture_survives_the_way_in_and_out(values: list[int]) -> None:
    if len(set(values)) == 1:
        return
    picture = Image.frombytes("RGB", (2, 2), bytes(values))
    assert shown(to_pixels(picture)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_a_device_fault(
    bad: float, everywhere: bool, dtype: torch.dtype
) -> None:
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16).to(dtype)
    if everywhere:
        pixels.fill_(bad)
    else:
        pixels[0, 2, 15, 15] = bad
    with pytest.raises(DeviceFaultError, match="values that are not finite"):
        shown(pixels)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0, 0.25, -3.0])
def test_one_constant_value_is_a_device_fault(value: float) -> None:
    with pytest.raises(DeviceFaultError, match="one constant colour"):
        shown(torch.full((1, 3, 16, 16), value))


def test_a_nearly_constant_picture_is_one() -> None:
    pixels = torch.full((1, 3, 16, 16), 0.9)
    pixels[0, 0, 0, 0] = 0.89999
    assert len(set(shown(pixels).tobytes())) == 1


@pytest.mark.parametrize("filters", [False, True], ids=["host", "device"])
def test_a_device_that_filters_gives_the_lines_of_its_pictures(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, filters: bool
) -> None:
    monkeypatch.setattr(Runtime, "filters_pictures", filters)
    pipe = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype="float32")
    for picture in pipe.generate(ASKED).pictures:
        assert (picture.width, picture.height) == (96, 64)
        rows = picture.pixels.reshape(64, -1)
        expected = np.concatenate(list(filtered(rows, strip_height(*rows.shape))))
        if filters:
            assert picture.lines is not None and np.array_equal(picture.lines, expected)
        else:
            assert picture.lines is None


def deflated(lines: torch.Tensor, strip_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As the kernels do it, but all in one block, whatever its codes are."""
    assert strip_rows % SAMPLED == 0
    data = lines.numpy().tobytes()
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    stream = torch.frombuffer(bytearray(packer.compress(data) + packer.flush()), dtype=torch.uint8)
    values = lines.flatten().long()
    weighted = values * torch.arange(len(data), 0, -1)
    return stream, torch.stack((torch.tensor(8 * len(stream)), values.sum(), weighted.sum()))


@pytest.mark.parametrize("least_bits", [0, 2, 9], ids=["any", "as it is", "none"])
@pytest.mark.parametrize("spare", [-1, 0, 100])
def test_what_a_device_compresses_is_taken_where_it_is_whole_and_worth_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, least_bits: int, spare: int
) -> None:
    def into_memory(lines: torch.Tensor, strip_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream, told = deflated(lines, strip_rows)
        return torch.cat((stream, stream))[: len(stream) + spare], told

    monkeypatch.setattr(Runtime, "filters_pictures", True)
    monkeypatch.setattr(Runtime, "deflate", property(lambda _: into_memory))
    monkeypatch.setattr(pictures, "LEAST_BITS", least_bits)
    pipe = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype="float32")
    picture, _ = pipe.generate(ASKED).pictures
    rows = picture.pixels.reshape(64, -1)
    expected = np.concatenate(list(filtered(rows, strip_height(*rows.shape)))).tobytes()
    if spare < 0 or least_bits == 9:
        assert picture.deflated is None
        assert picture.lines is not None and picture.lines.tobytes() == expected
    else:
        assert picture.deflated is not None and picture.lines is None
        assert zlib.decompress(picture.deflated.data.tobytes(), -zlib.MAX_WBITS) == expected
        assert picture.deflated.adler == zlib.adler32(expected)
