"""Files that are small and cost hours are refused at once; what real files look like is read."""

from __future__ import annotations

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from app.engine.picture_files import MAX_PARTS, MAX_SCANS, CostlyFileError, check_cost
from app.engine.pictures import PictureError, read_picture

PIXELS = 25_000_000
# A refusal takes milliseconds; what is refused would take minutes or hours.
AT_ONCE_S = 10.0


def file_of(picture: Image.Image, picture_format: str, **options: object) -> bytes:
    target = io.BytesIO()
    picture.save(target, picture_format, **options)
    return target.getvalue()


def refused(data: bytes) -> str:
    started_s = time.monotonic()
    with pytest.raises(PictureError) as caught:
        read_picture(data, PIXELS)
    assert time.monotonic() - started_s < AT_ONCE_S
    return str(caught.value)


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


PNG = file_of(Image.new("L", (64, 64), 128), "PNG")
JPEG = file_of(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
PNG_HEAD, JPEG_HEAD = PNG[:33], JPEG[:2]


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = file_of(Image.new("L", (5000, 4000), 128), "JPEG", progressive=True, quality=10)
    start, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    assert f"more than {MAX_SCANS} scans" in refused(
        data[:end] + data[start:end] * 100_000 + data[end:]
    )


def test_files_of_endless_empty_parts_are_refused() -> None:
    assert "chunks" in refused(PNG_HEAD + chunk(b"tEXt", b"a\0b") * 500_000 + PNG[33:])
    assert "chunks" in refused(PNG_HEAD + chunk(b"IDAT") * 500_000 + PNG[33:])
    assert "segments" in refused(JPEG_HEAD + b"\xff\xe5\x00\x02" * 1_000_000 + JPEG[2:])
    assert "segments" in refused(JPEG_HEAD + b"\xff\x01" * 1_000_000 + JPEG[2:])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_photo_with_a_film_behind_it_is_read(progressive: bool) -> None:
    """Phones append films and depth maps, in whose bytes anything may stand."""
    photo = Image.effect_noise((1200, 900), 80).convert("RGB")
    data = file_of(photo, "JPEG", progressive=progressive, exif=b"Exif\0\0" + b"\xff\xda" * 500)
    assert read_picture(data + b"\xff\xda\x00\x02" * 100_000, PIXELS).size == photo.size


def test_a_large_png_in_small_chunks_is_read() -> None:
    data = PNG_HEAD
    picture = PNG[33:]
    length = struct.unpack(">I", picture[:4])[0]
    pixels = picture[8 : 8 + length]
    for byte in pixels:
        data += chunk(b"IDAT", bytes([byte]))
    assert read_picture(data + chunk(b"tEXt", b"a\0b") * 1000 + chunk(b"IEND"), PIXELS)


@pytest.mark.parametrize(("mode", "bytes_per_pixel"), [("RGB", 3), ("L", 1)])
def test_pixels_are_counted_before_they_are_decoded(mode: str, bytes_per_pixel: int) -> None:
    """A few hundred KB of zeros that would become gigabytes."""
    sides = 30_000
    header = struct.pack(">IIBBBBB", sides, sides, 8, 2 if mode == "RGB" else 0, 0, 0, 0)
    zeros = zlib.compress(bytes(10_000_000), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND")
    assert f"more than {PIXELS} pixels" in refused(data)


def test_a_bomb_in_text_or_profile_is_refused_or_left_packed() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    for part in (
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb),
    ):
        assert refused(PNG_HEAD + part + PNG[33:]) == "is truncated or corrupt"


def test_frame_bombs_are_refused_unread() -> None:
    frames = [Image.new("RGB", (64, 64), (i % 256, 0, 0)) for i in range(300)]
    for picture_format in ("PNG", "WEBP"):
        data = file_of(frames[0], picture_format, save_all=True, append_images=frames[1:])
        assert refused(data) == "is animated; send a single frame"
    # An animation that claims more frames than anybody could hold.
    control = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    assert refused(PNG_HEAD + control + PNG[33:])


@pytest.mark.parametrize(
    "start", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF\xff\xff\xff\xffWEBPVP8X", b""]
)
def test_broken_files_are_left_to_the_decoder(start: bytes) -> None:
    for rest in (b"", b"\xff", b"\xff\xe1", b"\xff\xe1\xff", b"\xff\xe1\xff\xff", b"\0" * 100):
        check_cost(start + rest)


def test_the_walk_ends_on_any_input() -> None:
    # Lengths of zero must not make it stand still.
    with pytest.raises(CostlyFileError):
        check_cost(b"\x89PNG\r\n\x1a\n" + bytes(12 * (MAX_PARTS + 1)))
    with pytest.raises(CostlyFileError):
        check_cost(b"\xff\xd8" + b"\xff\xe1\x00\x00" * (MAX_PARTS + 1))
