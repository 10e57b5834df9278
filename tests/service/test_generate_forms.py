"""``POST /v1/generate`` as a form: files as they are, everything else as text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app, create_engine
from fluxcore import FluxPipeline
from tests.service.conftest import Start, encode, error_of, settings_for_tests, wait_until

PICTURE = Image.effect_noise((80, 64), 60).convert("RGB")
MASK = Image.new("L", PICTURE.size)
MASK.paste(255, (40, 0, 80, 64))


def file_of(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()


PHOTO = ("photo.jpg", file_of(PICTURE), "image/jpeg")
Part = tuple[str, Any]


@pytest.fixture(scope="module")
def client(tiny_pipeline: FluxPipeline) -> Iterator[TestClient]:
    settings = settings_for_tests(default_width=64, default_height=64)
    engine = create_engine(settings, lambda progress: tiny_pipeline)
    with TestClient(create_app(settings, engine)) as client:
        wait_until(lambda: engine.status().is_ready)
        yield client


def send(client: TestClient, *files: Part, accept: str = "*/*", **fields: str) -> httpx2.Response:
    # A file of no name makes a form of text parts.
    parts = [*files, *((name, (None, value)) for name, value in fields.items())]
    return client.post("/v1/generate", files=parts, headers={"Accept": accept})


def drawn(client: TestClient, *files: Part, **fields: str) -> Any:
    answer = send(client, *files, **{"prompt": "a red fox", "seed": "3", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_json(client: TestClient, **body: Any) -> Any:
    answer = client.post("/v1/generate", json={"prompt": "a red fox", "seed": 3, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_text_alone(client: TestClient) -> None:
    made = drawn(client, width="96", height="64", steps="2", n="2", output_format="webp")
    assert (
        made["images"]
        == by_json(client, width=96, height=64, steps=2, n=2, output_format="webp")["images"]
    )


def test_a_file_is_a_reference(client: TestClient) -> None:
    made = drawn(client, ("image", PHOTO))
    assert (made["images"][0]["width"], made["images"][0]["height"]) == PICTURE.size
    assert made["images"] == by_json(client, images=[encode(PICTURE)])["images"]


@pytest.mark.parametrize("name", ["image", "image[]", "images", "images[]"])
def test_several_files(client: TestClient, name: str) -> None:
    made = drawn(client, (name, PHOTO), (name, PHOTO))
    assert made["params"]["references"] == 2


def test_a_mask(client: TestClient) -> None:
    made = drawn(client, ("image", PHOTO), ("mask", ("m.png", file_of(MASK))), strength="0.75")
    assert (
        made["images"]
        == by_json(client, images=[encode(PICTURE)], mask=encode(MASK), strength=0.75)["images"]
    )


def test_bytes_straight_out(client: TestClient) -> None:
    answer = send(client, ("image", PHOTO), accept="image/jpeg", prompt="a red fox")
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == PICTURE.size


@pytest.mark.parametrize(
    ("files", "fields", "param", "says"),
    [
        ([], {}, "prompt", "prompt is required"),
        ([], {"prompt": ""}, "prompt", "prompt is required"),
        ([], {"prompt": "x", "widht": "64"}, "widht", "did you mean 'width'?"),
        ([], {"prompt": "x", "width": "wide"}, "width", "valid integer"),
        ([], {"prompt": "x", "width": "70"}, "width", "multiple of 16"),
        ([("imgae", PHOTO)], {"prompt": "x"}, "imgae", "did you mean 'image'?"),
        ([("prompt", PHOTO)], {}, "prompt", "prompt must be text, and came as a file"),
        ([("seed", (None, "2"))], {"prompt": "x", "seed": "1"}, "seed", "must be sent once"),
        ([("image", ("a", b"zzz"))], {"prompt": "x"}, "images[0]", "is not a PNG"),
        ([("mask", ("a", file_of(MASK)))], {"prompt": "x"}, "mask", "needs a picture"),
    ],
)
def test_what_is_wrong_is_named(
    start: Start, files: list[Part], fields: dict[str, str], param: str, says: str
) -> None:
    answer = send(start(), *files, **(fields or {"seed": "1"}))
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert says in error["message"]


def test_a_form_streams(client: TestClient) -> None:
    answer = send(client, ("image", PHOTO), prompt="a red fox", stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "event: completed\n" in answer.text
