"""The bundled model draws what was asked: prompts over HTTP, pixels looked at.

Few cases, each of which stands for one thing that it can do; how often it gets such
things right is the judge's to say, in demo/. The seeds are fixed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from app.main import create_app, create_engine, pipeline_loader
from app.settings import Settings
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.pipeline.denoise import DenoiseStep
from tests.demo.looking import colour_at, colours_at, corners, mean_difference, share_of
from tests.service.conftest import encode, wait_until

SIZE = 256
SMALL: dict[str, Any] = {"width": 128, "height": 128}
"""Half as long to draw, for what the default size need not be seen in each time."""
CENTER = (0.5, 0.5)
BOX = (0.3, 0.3, 0.7, 0.7)
"""Around a figure of medium size in the middle: left, top, right, bottom."""


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    settings = Settings(device="cpu", shutdown_grace_s=0, warm_up_sizes=())
    engine = create_engine(settings, pipeline_loader(None, settings))
    app = create_app(settings, engine)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        wait_until(lambda: engine.status().is_ready)
        yield client


def drawn(client: TestClient, prompt: str, **given: Any) -> Image.Image:
    (picture,) = all_drawn(client, prompt, **given)
    return picture


def all_drawn(client: TestClient, prompt: str, **given: Any) -> list[Image.Image]:
    answer = client.post("/v1/generate", json={"prompt": prompt, "seed": 1, **given})
    assert answer.status_code == 200, answer.text
    assert answer.json()["warnings"] == []
    files = [base64.b64decode(image["b64"]) for image in answer.json()["images"]]
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]


def circle(colour: str = "#dc2828", background: str = "#fafafa") -> Image.Image:
    """A circle in the middle, as a person would draw one: a reference."""
    large = Image.new("RGB", (SIZE * 4, SIZE * 4), background)
    ImageDraw.Draw(large).ellipse([round(SIZE * 4 * share) for share in BOX], fill=colour)
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)


def square(colour: str, background: str) -> Image.Image:
    """Another reference, to take a colour from."""
    picture = Image.new("RGB", (SIZE, SIZE), background)
    ImageDraw.Draw(picture).rectangle([round(SIZE * share) for share in BOX], fill=colour)
    return picture


class TestPrompts:
    @pytest.mark.parametrize(
        "prompt",
        [
            "a large red circle in the center on a white background",
            "a big scarlet disc in the middle on a white background",
            "on a white background, a large crimson ball in the center",
            "A picture of a huge red circle at the center on a plain white background.",
        ],
    )
    def test_a_large_red_circle_however_it_is_called(self, client: TestClient, prompt: str) -> None:
        picture = drawn(client, prompt)
        assert picture.size == (SIZE, SIZE)
        inside = (CENTER, (0.3, 0.5), (0.7, 0.5), (0.5, 0.3), (0.5, 0.7))
        assert colours_at(picture, *inside) == ["red"] * 5
        assert corners(picture) == {"white"}
        # Round, not square: the corners of the box around it are empty.
        box = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))
        assert colours_at(picture, *box) == ["white"] * 4
        assert 0.2 < share_of(picture, "red") < 0.36  # pi * 0.3 ** 2 = 0.28

    def test_a_square_fills_its_corners(self, client: TestClient) -> None:
        picture = drawn(client, "a large blue square in the center on a yellow background")
        assert colour_at(picture, *CENTER) == "blue"
        assert corners(picture) == {"yellow"}
        assert 0.12 < share_of(picture, "blue") < 0.45

    @pytest.mark.parametrize(
        ("prompt", "first", "second"),
        [
            ("a blue circle to the left of a yellow square", (0.26, 0.5), (0.74, 0.5)),
            ("a blue circle to the right of a yellow square", (0.74, 0.5), (0.26, 0.5)),
            ("a blue circle above a yellow square", (0.5, 0.26), (0.5, 0.74)),
            ("a blue circle below a yellow square", (0.5, 0.74), (0.5, 0.26)),
            ("a blue circle inside a yellow square", (0.5, 0.5), (0.5, 0.28)),
        ],
    )
    def test_relations_between_two(
        self,
        client: TestClient,
        prompt: str,
        first: tuple[float, float],
        second: tuple[float, float],
    ) -> None:
        picture = drawn(client, f"{prompt} on a white background", **SMALL)
        assert colours_at(picture, first, second) == ["blue", "yellow"]
        assert corners(picture) == {"white"}

    @pytest.mark.parametrize(
        ("place", "x", "y"),
        [("top left", 0.2, 0.2), ("bottom right", 0.8, 0.8), ("top", 0.5, 0.2), ("left", 0.2, 0.5)],
    )
    def test_places(self, client: TestClient, place: str, x: float, y: float) -> None:
        words = f"a small black circle at the {place} on a cyan background"
        picture = drawn(client, words, **SMALL)
        assert colour_at(picture, x, y) == "black"
        assert colour_at(picture, 1 - x if x != 0.5 else 0.2, 1 - y if y != 0.5 else 0.2) == "cyan"
        assert colour_at(picture, *CENTER) == "cyan"
        assert 0.02 < share_of(picture, "black") < 0.1

    def test_sizes_differ_as_asked(self, client: TestClient) -> None:
        shares = []
        for size in ("small", "medium", "large"):
            picture = drawn(client, f"a {size} green circle on a white background", **SMALL)
            shares.append(share_of(picture, "green"))
        assert shares[0] * 1.5 < shares[1] and shares[1] * 1.5 < shares[2], shares

    def test_three_figures_at_their_places(self, client: TestClient) -> None:
        picture = drawn(
            client,
            "a red circle at the top left, a blue square at the bottom right and a green circle "
            "in the center on a white background",
        )
        assert colours_at(picture, (0.2, 0.2), (0.8, 0.8), CENTER) == ["red", "blue", "green"]

    def test_backgrounds_of_two_colours(self, client: TestClient) -> None:
        striped = drawn(client, "a red circle on a vertical black and yellow striped background")
        row = {colour_at(striped, (i + 0.5) / 32, 0.06) for i in range(32)}
        assert {"black", "yellow"} <= row
        assert colour_at(striped, *CENTER) == "red"
        gradient = drawn(
            client,
            "a red circle on a gradient background from blue at the top to white at the bottom",
        )
        assert colours_at(gradient, (0.5, 0.03), (0.5, 0.97)) == ["blue", "white"]

    @pytest.mark.parametrize(("width", "height"), [(128, 128), (384, 256), (256, 384), (512, 512)])
    def test_other_sizes_show_the_same(self, client: TestClient, width: int, height: int) -> None:
        picture = drawn(
            client,
            "a large red circle in the center on a white background",
            width=width,
            height=height,
        )
        assert picture.size == (width, height)
        assert colour_at(picture, *CENTER) == "red"
        assert corners(picture) == {"white"}

    def test_seeds_vary_what_was_left_open_and_nothing_else(self, client: TestClient) -> None:
        words = {"seed": 5, "n": 3, **SMALL}
        pictures = all_drawn(client, "a large purple heart on a white background", **words)
        assert all(colour_at(picture, *CENTER) == "purple" for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == 3


class TestEdits:
    def test_make_it_blue(self, client: TestClient) -> None:
        before = circle()
        picture = drawn(client, "make it blue", images=[encode(before)])
        assert picture.size == before.size
        assert colour_at(picture, *CENTER) == "blue"
        assert corners(picture) == {"white"}
        assert share_of(picture, "blue") == pytest.approx(share_of(before, "red"), abs=0.04)

    def test_move_it_to_the_top_left(self, client: TestClient) -> None:
        picture = drawn(client, "move it to the top left", images=[encode(circle())])
        assert colours_at(picture, (0.25, 0.25), (0.6, 0.6)) == ["red", "white"]

    def test_put_it_on_a_yellow_background(self, client: TestClient) -> None:
        picture = drawn(client, "put it on a yellow background", images=[encode(circle())])
        assert colour_at(picture, *CENTER) == "red"
        assert corners(picture) == {"yellow"}

    def test_add_a_green_star(self, client: TestClient) -> None:
        before = circle()
        picture = drawn(client, "add a green star", images=[encode(before)])
        assert colour_at(picture, *CENTER) == "red"
        assert share_of(before, "green") < 0.001 < 0.005 < share_of(picture, "green")

    def test_remove_the_circle(self, client: TestClient) -> None:
        picture = drawn(client, "remove the circle", images=[encode(circle())])
        assert share_of(picture, "white") > 0.98

    def test_the_shape_of_one_in_the_colour_of_the_other(self, client: TestClient) -> None:
        pictures = [encode(circle()), encode(square("#2850dc", "#fad732"))]
        picture = drawn(client, "the shape of image 1 in the color of image 2", images=pictures)
        assert colour_at(picture, *CENTER) == "blue"
        assert corners(picture) == {"white"}

    def test_a_mask_keeps_what_lies_outside(self, client: TestClient) -> None:
        before = circle("#28a03c", "#fad732")
        mask = Image.new("L", before.size, 0)
        ImageDraw.Draw(mask).rectangle((48, 48, 207, 207), fill=255)
        picture = drawn(client, "make it blue", images=[encode(before)], mask=encode(mask))
        assert colour_at(picture, *CENTER) == "blue"
        assert corners(picture) == {"yellow"}
        edge = (0, 0, SIZE, 32)
        assert mean_difference(picture.crop(edge), before.crop(edge)) < 4


def test_previews_show_the_coming_picture() -> None:
    """What the model sees coming after steps 1, 2 and 3 of 4 is the picture, ever sharper."""
    pipeline = FluxPipeline.load(device="cpu")
    steps: list[DenoiseStep] = []
    result = pipeline.generate(
        GenerationParams(
            prompt="a large red circle in the center on a white background", seed=1, steps=4
        ),
        on_step=lambda step, _: steps.append(step),
    )
    previews = [pipeline.decode(step.predicted_clean(), SIZE, SIZE).image for step in steps]
    final = result.images[0]
    assert len(previews) == 4
    for preview in previews:
        assert colour_at(preview, *CENTER) == "red"
        assert corners(preview) == {"white"}
    distances = [mean_difference(preview, final) for preview in previews]
    assert distances[3] < 1.0, "after the last step it is the picture itself"
    assert distances[0] < 25 and distances[2] < distances[0], distances
