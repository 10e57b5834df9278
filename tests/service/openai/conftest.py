"""The OpenAI routes around a real tiny model, and pictures to send them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app, create_engine
from fluxcore import FluxPipeline
from tests.service.conftest import settings_for_tests, wait_until


def file_of(picture: Image.Image, picture_format: str = "PNG") -> bytes:
    """A picture as a file."""
    target = io.BytesIO()
    picture.save(target, picture_format)
    return target.getvalue()


PICTURE = Image.effect_noise((80, 64), 60).convert("RGB")
PNG = file_of(PICTURE)
JPEG = file_of(PICTURE, "JPEG")
WEBP = file_of(PICTURE, "WEBP")
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
MASK_PICTURE = Image.new("RGBA", PICTURE.size, (0, 0, 0, 255))
MASK_PICTURE.paste((0, 0, 0, 0), (40, 0, 80, 64))
MASK = file_of(MASK_PICTURE)


@pytest.fixture(scope="module")
def client(tiny_pipeline: FluxPipeline) -> Iterator[TestClient]:
    """A service around the tiny model."""
    settings = settings_for_tests(default_width=64, default_height=64)
    engine = create_engine(settings, lambda progress: tiny_pipeline)
    with TestClient(create_app(settings, engine)) as client:
        wait_until(lambda: engine.status().is_ready)
        yield client


@dataclass
class Images:
    """The answer of an image route, checked."""

    body: dict[str, Any]
    pictures: list[Image.Image]

    @classmethod
    def of(cls, client: Any, answer: httpx2.Response) -> Images:
        """Fetch or decode every picture; each comes in one of the two ways and nothing is null."""
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()
        assert None not in body.values()
        pictures = []
        for item in body["data"]:
            assert ("url" in item) != ("b64_json" in item)
            assert None not in item.values()
            if "url" in item:
                fetched = client.get(item["url"])
                assert fetched.status_code == 200
                assert fetched.headers["content-type"] == f"image/{body['output_format']}"
                pictures.append(picture_of(fetched.content))
            else:
                pictures.append(picture_of(base64.b64decode(item["b64_json"], validate=True)))
        return cls(body, pictures)


def picture_of(data: bytes) -> Image.Image:
    """A file as a picture, all of it decoded."""
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def same(first: Image.Image, second: Image.Image) -> bool:
    """Whether two pictures have the same pixels."""
    return first.size == second.size and first.tobytes() == second.tobytes()
