"""Input pictures: orientation, transparency, masks, limits and broken files."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.api.input_pictures import PictureLimits, decode_pictures
from app.engine.pictures import PictureError, read_mask, read_picture

LIMIT = 1_000_000
RED, WHITE = (255, 0, 0), (255, 255, 255)


def file_of(picture: Image.Image, picture_format: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    picture.save(target, picture_format, **options)
    return target.getvalue()


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read_as_rgb(picture_format: str) -> None:
    picture = read_picture(file_of(Image.new("RGB", (20, 10), RED), picture_format), LIMIT)
    assert (picture.mode, picture.size) == ("RGB", (20, 10))
    red, green, blue = picture.getpixel((5, 5))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    picture = read_picture(
        file_of(
            Image.new("RGB", (20, 10), WHITE).convert("L").convert(mode)
            if mode != "I;16"
            else Image.new("I;16", (20, 10), 65535)
        ),
        LIMIT,
    )
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == WHITE


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    grey = read_picture(file_of(Image.new("I;16", (4, 4), 0x8000)), LIMIT)
    assert grey.getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_jpegs_become_rgb() -> None:
    assert read_picture(file_of(Image.new("CMYK", (8, 8)), "JPEG"), LIMIT).mode == "RGB"


def test_transparency_shows_white() -> None:
    picture = Image.new("RGBA", (4, 1), (*RED, 255))
    picture.putpixel((0, 0), (*RED, 0))
    picture.putpixel((1, 0), (*RED, 128))
    read = read_picture(file_of(picture), LIMIT)
    assert read.getpixel((0, 0)) == WHITE
    assert read.getpixel((1, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert read.getpixel((2, 0)) == RED


def test_a_transparent_palette_colour_shows_white() -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    read = read_picture(file_of(picture, transparency=0), LIMIT)
    assert (read.getpixel((0, 0)), read.getpixel((1, 0))) == (WHITE, (0, 0, 255))


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied(picture_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste(RED, (0, 0, 16, 16))
    read = read_picture(file_of(picture, picture_format, exif=exif), LIMIT)
    assert read.size == (16, 32)
    assert read.getpixel((8, 4))[0] > 200 and read.getpixel((8, 28))[0] < 50


def test_a_phone_jpeg_of_several_pictures_is_read_as_its_first() -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), "blue")
    data = file_of(first, "MPO", save_all=True, append_images=[second])
    assert read_picture(data, LIMIT).getpixel((8, 8))[0] > 250


@pytest.mark.parametrize("picture_format", ["PNG", "WEBP"])
def test_animations_are_refused(picture_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = file_of(frames[0], picture_format, save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="animated"):
        read_picture(data, LIMIT)


def test_the_pixel_limit_is_inclusive() -> None:
    data = file_of(Image.new("L", (100, 100)))
    assert read_picture(data, 10_000).size == (100, 100)
    with pytest.raises(PictureError, match="has 100x100 pixels; at most 9999"):
        read_picture(data, 9_999)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(5000, 5000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="pixels"):
        read_picture(png_bomb(*size), LIMIT)


def test_text_bombs_are_refused() -> None:
    data = file_of(Image.new("L", (8, 8)))
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000), 9))
    with pytest.raises(PictureError, match="truncated or corrupt"):
        read_picture(data[:33] + bomb + data[33:], LIMIT)


@pytest.mark.parametrize("read", [read_picture, read_mask])
def test_more_transparent_colours_than_a_palette_has_are_refused(
    read: Callable[[bytes, int], Image.Image],
) -> None:
    data = file_of(Image.new("P", (8, 8)))
    place = data.index(b"IDAT") - 4
    # Found when the picture is converted, after all of the file has been read.
    transparency = png_chunk(b"tRNS", bytes(257))
    with pytest.raises(PictureError, match="truncated or corrupt"):
        read(data[:place] + transparency + data[place:], LIMIT)


SEEDS = [
    file_of(Image.effect_noise((24, 20), 50).convert(mode), picture_format)
    for mode, picture_format in (
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
    )
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    seed=st.sampled_from(SEEDS),
    length=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_broken_files_are_refused_or_read_but_never_crash(
    seed: bytes, length: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(seed[: round(len(seed) * length)])
    for place, value in changes:
        if data:
            data[int(place * len(data))] = value
    for read, mode in ((read_picture, "RGB"), (read_mask, "L")):
        try:
            picture = read(bytes(data), LIMIT)
        except PictureError:
            continue
        assert picture.mode == mode and picture.width * picture.height <= LIMIT


def mask_values(mask: Image.Image) -> list[int]:
    return list(mask.tobytes())


def test_white_is_drawn_again_in_a_mask_without_transparency() -> None:
    grey = Image.new("L", (4, 1))
    grey.putdata([0, 127, 128, 255])
    mask = read_mask(file_of(grey), LIMIT)
    assert mask.mode == "L"
    assert mask_values(mask) == [0, 0, 255, 255]


def test_transparent_is_drawn_again_in_a_mask_with_transparency() -> None:
    picture = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.putpixel((2, 0), (255, 255, 255, 1))
    assert mask_values(read_mask(file_of(picture), LIMIT)) == [0, 255, 0]


def test_a_one_bit_mask_works() -> None:
    picture = Image.new("1", (2, 1))
    picture.putpixel((0, 0), 1)
    assert mask_values(read_mask(file_of(picture), LIMIT)) == [255, 0]


@pytest.mark.parametrize(
    ("picture", "rule"),
    [
        (Image.new("L", (4, 4)), "make those parts white"),
        (Image.new("RGBA", (4, 4), "white"), "make those parts transparent"),
    ],
)
def test_a_mask_that_marks_nothing_is_refused(picture: Image.Image, rule: str) -> None:
    with pytest.raises(PictureError, match=rule):
        read_mask(file_of(picture), LIMIT)


@pytest.mark.parametrize(
    "head", ["", "data:image/png;base64,", "data:;BASE64,", "DATA:x;a=b;base64,"]
)
def test_base64_comes_bare_or_as_a_data_url_and_with_line_breaks(head: str) -> None:
    text = base64.encodebytes(file_of(Image.new("RGB", (20, 10), RED))).decode()
    assert "\n" in text
    decoded = decode_pictures(
        [head + text.replace("\n", "\r\n")], None, PictureLimits(LIMIT, LIMIT)
    )
    assert decoded.references[0].size == (20, 10)
    assert decoded.mask is None
