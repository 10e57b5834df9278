"""Picture files: what other programs read in them."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.metadata import EXIF_PROMPT_CHARS, Provenance, parameters_text
from app.engine.packing import Packing, PictureFormat, pack_picture
from fluxcore.drawn import DeflatedLines, DrawnPicture
from fluxcore.params import GenerationParams
from fluxcore.pipeline.pictures import to_lines
from tests.service.conftest import StartLive
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, as_drawn

PICTURE = as_drawn(Image.effect_noise((64, 48), 60).convert("RGB"))
MADE = Provenance(
    prompt="a red fox",
    negative_prompt=None,
    seed=42,
    width=64,
    height=48,
    steps=4,
    guidance=None,
    schedule="flux",
    model="FLUX.2-klein-4B",
    version="1.2.3",
)
UNICODE = replace(MADE, prompt="été 猫\nsecond line", negative_prompt="flou, мутный")


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def user_comment(picture: Image.Image) -> str:
    raw = picture.getexif().get_ifd(0x8769)[0x9286]
    assert raw[:8] == b"UNICODE\0"
    return str(raw[8:].decode("utf-16-be"))


def test_the_parameters_text_is_the_one_that_viewers_parse() -> None:
    assert parameters_text(MADE) == (
        "a red fox\n"
        "Steps: 4, Sampler: Euler, Schedule type: flux, CFG scale: 1, Seed: 42, Size: 64x48, "
        "Model: FLUX.2-klein-4B, Version: fluxd 1.2.3"
    )
    guided = replace(MADE, negative_prompt="blurry", guidance=4.0, model='a, "b": c')
    assert parameters_text(guided).splitlines()[1:] == [
        "Negative prompt: blurry",
        (
            "Steps: 4, Sampler: Euler, Schedule type: flux, CFG scale: 4, Seed: 42, Size: 64x48, "
            'Model: "a, \\"b\\": c", Version: fluxd 1.2.3'
        ),
    ]


def test_a_web_ui_reader_gets_the_pairs_back() -> None:
    # The expression that AUTOMATIC1111's reader takes the last line apart with.
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    made = replace(MADE, model="klein, mine")
    pairs = dict(pattern.findall(parameters_text(made).splitlines()[-1]))
    assert pairs["Seed"] == "42"
    assert pairs["Size"] == "64x48"
    assert json.loads(pairs["Model"]) == "klein, mine"


@pytest.mark.parametrize("made", [MADE, UNICODE], ids=["latin-1", "unicode"])
def test_a_png_carries_everything_in_text_chunks(made: Provenance) -> None:
    packed = pack_picture(PICTURE, Packing("png"), made)
    assert (packed.format, packed.seed, packed.width, packed.height) == ("png", 42, 64, 48)
    picture = opened(packed.data)
    assert picture.format == "PNG"
    assert picture.tobytes() == PICTURE.pixels.tobytes()
    text = picture.text
    assert text["parameters"] == parameters_text(made)
    assert text["Title"] == made.prompt.splitlines()[0]
    assert text["Description"] == made.prompt
    assert text["Software"] == "fluxd 1.2.3"
    assert text["Source"] == "FLUX.2-klein-4B"
    assert json.loads(text["Comment"]) == {
        "seed": 42,
        "width": 64,
        "height": 48,
        "steps": 4,
        "guidance": None,
        "schedule": "flux",
        "negative_prompt": made.negative_prompt,
        "model": "FLUX.2-klein-4B",
        "version": "1.2.3",
    }


def test_latin_text_is_in_plain_chunks_and_other_text_in_international_ones() -> None:
    assert b"iTXt" not in pack_picture(PICTURE, Packing("png"), MADE).data
    data = pack_picture(PICTURE, Packing("png"), UNICODE).data
    assert b"iTXtparameters" in data and b"tEXtSoftware" in data


@pytest.mark.parametrize("picture_format", ["jpeg", "webp"])
@pytest.mark.parametrize("made", [MADE, UNICODE], ids=["latin-1", "unicode"])
def test_jpeg_and_webp_carry_it_in_exif(picture_format: PictureFormat, made: Provenance) -> None:
    data = pack_picture(PICTURE, Packing(picture_format), made).data
    # The byte order of the file is the one that the comment is in.
    assert b"MM\0*" in data
    picture = opened(data)
    assert picture.format == picture_format.upper()
    exif = picture.getexif()
    assert exif[0x010E].encode("latin-1").decode() == made.prompt
    assert exif[0x0131] == "fluxd 1.2.3"
    assert user_comment(picture) == parameters_text(made)


@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("letter", ["a", "猫", "🦊", "\0", "\n"])
def test_the_longest_prompts_fit(picture_format: PictureFormat, letter: str) -> None:
    made = replace(MADE, prompt="x" + letter * 31_999, negative_prompt=letter * 32_000)
    picture = opened(pack_picture(PICTURE, Packing(picture_format), made).data)
    if picture_format == "png":
        assert picture.text["Description"] == made.prompt.replace("\0", "")
    else:
        head = ("x" + letter * EXIF_PROMPT_CHARS)[: EXIF_PROMPT_CHARS - 1]
        assert user_comment(picture).startswith(head)
        assert "Steps: 4" in user_comment(picture)


@pytest.mark.parametrize("picture_format", ["jpeg", "webp"])
def test_quality_has_an_effect(picture_format: PictureFormat) -> None:
    sizes = [
        len(pack_picture(PICTURE, Packing(picture_format, quality), MADE).data)
        for quality in (10, 60, 100)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
def test_equal_pictures_are_equal_files(picture_format: PictureFormat) -> None:
    first, second = (pack_picture(PICTURE, Packing(picture_format), MADE).data for _ in range(2))
    assert first == second


def test_a_png_needs_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Image.Image] = []
    plain = Image.Image.__init__

    def noted(image: Image.Image) -> None:
        made.append(image)
        plain(image)

    monkeypatch.setattr(Image.Image, "__init__", noted)
    picture = DrawnPicture(PICTURE.pixels)
    pack_picture(picture, Packing("png"), MADE)
    assert not made
    pack_picture(picture, Packing("jpeg"), MADE)
    assert made


class Noisy(FakePipeline):
    """Draws noise that a device filtered, or did not. Lines that are used can be told apart."""

    def __init__(self, *, filters: bool, spoils: bool = False) -> None:
        super().__init__()
        self._filters, self._spoils = filters, spoils

    def run(
        self, params: GenerationParams, *, alone: bool = False
    ) -> Generator[FakeSlice, None, FakeResult]:
        result = yield from super().run(params)
        pictures = [self._drawn(seed, params) for seed in result.seeds]
        return replace(result, pictures=pictures)

    def _drawn(self, seed: int, params: GenerationParams) -> DrawnPicture:
        shape = (params.height or 64, params.width or 64, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        lines = to_lines(torch.from_numpy(pixels)).numpy()
        if self._spoils:
            lines[0, 1:] += 1
        return DrawnPicture(pixels, lines if self._filters else None)


def test_a_file_does_not_tell_who_filtered(start_live: StartLive) -> None:
    asked = {"width": 256, "height": 192, "seed": 5, "n": 2}
    files = []
    for pipeline in (
        Noisy(filters=False),
        Noisy(filters=True),
        Noisy(filters=True, spoils=True),
    ):
        answer = start_live(pipeline).generate("noise", **asked)
        assert answer.status_code == 200
        files.append([image["b64"] for image in answer.json()["images"]])
    by_host, by_device, spoiled = files
    assert len(set(by_host)) == 2
    assert by_host == by_device
    assert spoiled != by_device, "lines that are there are used"


@pytest.mark.parametrize("size", [(64, 48), (256, 256)])
def test_what_the_device_compressed_stands_in_the_file(size: tuple[int, int]) -> None:
    pixels = np.array(Image.effect_noise(size, 60).convert("RGB"))
    lines = to_lines(torch.from_numpy(pixels)).numpy().tobytes()
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = packer.compress(lines) + packer.flush()
    stream = DeflatedLines(np.frombuffer(data, np.uint8), zlib.adler32(lines))
    file = pack_picture(DrawnPicture(pixels, deflated=stream), Packing("png"), MADE).data
    assert data in file
    shown = Image.open(io.BytesIO(file))
    assert np.array_equal(np.asarray(shown), pixels)
    assert shown.text["Title"] == MADE.prompt  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
def test_exiftool_shows_it(tmp_path: Path, picture_format: PictureFormat) -> None:
    path = tmp_path / f"picture.{picture_format}"
    path.write_bytes(pack_picture(PICTURE, Packing(picture_format), UNICODE).data)
    shown = subprocess.run(
        ["exiftool", "-json", str(path)], capture_output=True, check=True, timeout=60
    )
    (tags,) = json.loads(shown.stdout)
    assert tags["Software"] == "fluxd 1.2.3"
    if picture_format == "png":
        assert tags["Description"] == UNICODE.prompt
        assert tags["Parameters"] == parameters_text(UNICODE)
    else:
        assert tags["ImageDescription"] == UNICODE.prompt
        assert tags["UserComment"] == parameters_text(UNICODE)
