"""PNG files: the very pixels, in valid streams, no larger than Pillow's."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.engine.png import SIGNATURE, write_png
from fluxcore.residues import AVERAGE, STRIP_BYTES, SUB, UP

TEXTS = [(b"tEXt", b"Software\0fluxd")]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def landscape(side: int) -> NDArray[np.uint8]:
    """Fractal noise under a little grain: as photographs are to an encoder."""
    chance = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(chance.standard_normal((side, side))) / frequency**1.2
        smooth = np.fft.irfft2(spectrum)
        grain = chance.standard_normal((side, side)) * 1.5
        channels.append(128 + 45 * smooth / smooth.std() + grain)
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """All (type, data), after checking signature, lengths and checksums."""
    assert data.startswith(SIGNATURE)
    position, found = len(SIGNATURE), []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        body = data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(kind + body),)
        found.append((kind, body))
        position += 12 + length
    assert position == len(data)
    return found


def lines(data: bytes, height: int) -> NDArray[np.uint8]:
    """What was compressed: filter and residues of each row. Checks the stream's checksum."""
    stream = b"".join(body for kind, body in chunks(data) if kind == b"IDAT")
    return np.frombuffer(zlib.decompress(stream), np.uint8).reshape(height, -1)


@pytest.mark.parametrize(
    "pixels",
    [
        noise(16, 16),
        noise(64, 2048),
        noise(2048, 64),
        noise(1, 1),
        noise(1, STRIP_BYTES),
        landscape(512),
        # Strips of 8 rows, the last of them too short to be looked at.
        noise(27, STRIP_BYTES // 24),
        np.zeros((64, 64, 3), np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
        np.asarray(Image.linear_gradient("L").convert("RGB").resize((512, 512))),
        np.asarray(Image.linear_gradient("L").rotate(90).convert("RGB")),
    ],
    ids=[
        "small",
        "wide",
        "tall",
        "pixel",
        "long",
        "photo",
        "rest",
        "black",
        "white",
        "fall",
        "side",
    ],
)
def test_the_pixels_come_back(pixels: NDArray[np.uint8]) -> None:
    data = write_png(Image.fromarray(pixels), TEXTS)
    read = Image.open(io.BytesIO(data))
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), pixels)
    assert lines(data, pixels.shape[0]).shape[1] == 1 + pixels.shape[1] * 3


def test_the_chunks_stand_in_order() -> None:
    kinds = [kind for kind, _ in chunks(write_png(Image.fromarray(landscape(512)), TEXTS))]
    assert kinds[:2] == [b"IHDR", b"tEXt"] and kinds[-1] == b"IEND"
    assert set(kinds[2:-1]) == {b"IDAT"} and len(kinds) > 5


def test_threads_change_nothing() -> None:
    picture = Image.fromarray(landscape(512))
    with ThreadPoolExecutor(3) as pool:
        assert write_png(picture, TEXTS, pool.map) == write_png(picture, TEXTS)


def test_a_small_picture_keeps_four_threads_busy() -> None:
    data = write_png(Image.fromarray(landscape(256)), [])
    # The last chunk of data is the checksum.
    assert [kind for kind, _ in chunks(data)].count(b"IDAT") == 4 + 1


def test_a_filter_is_chosen_that_fits() -> None:
    columns = np.broadcast_to(noise(1, 64), (64, 64, 3))
    rows = np.broadcast_to(noise(64, 1), (64, 64, 3))
    grain = 128 + noise(64, 512) // 16
    for pixels, kind in ((columns, UP), (rows, SUB), (grain, AVERAGE)):
        data = write_png(Image.fromarray(np.ascontiguousarray(pixels)), [])
        assert set(lines(data, 64)[:, 0]) == {kind}


def test_strips_of_one_picture_choose_for_themselves() -> None:
    side = 512
    top = np.broadcast_to(noise(1, side), (side // 2, side, 3))
    bottom = np.broadcast_to(noise(side // 2, 1), (side // 2, side, 3))
    data = write_png(Image.fromarray(np.concatenate((top, bottom))), [])
    assert {UP, SUB} <= set(lines(data, side)[:, 0])


@pytest.mark.parametrize("side", [256, 512])
def test_files_are_no_larger_than_pillows(side: int) -> None:
    picture = Image.fromarray(landscape(side))
    target = io.BytesIO()
    picture.save(target, "PNG", compress_level=6)
    assert len(write_png(picture, [])) < 1.02 * len(target.getvalue())
