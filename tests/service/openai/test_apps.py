"""What known applications send, to the letter, and what each reads of the answer.

The default size is small here; otherwise these are the sizes of the applications, drawn by
a pipeline that needs no time for them.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.service.conftest import Start
from tests.service.openai.conftest import PNG, picture_of

PROMPT = "A red fox in the snow"


def generate(client: TestClient, body: dict[str, Any], path: str = "/v1") -> dict[str, Any]:
    headers = {"Authorization": "Bearer sk-none", "Accept": "application/json"}
    answer = client.post(f"{path}/images/generations", json=body, headers=headers)
    return checked(answer)


def edit(client: TestClient, fields: dict[str, str], files: Any) -> dict[str, Any]:
    return checked(client.post("/v1/images/edits", data=fields, files=files))


def checked(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def decoded(item: dict[str, Any]) -> Image.Image:
    return picture_of(base64.b64decode(item["b64_json"], validate=True))


def fetched(client: TestClient, item: dict[str, Any]) -> Image.Image:
    answer = client.get(item["url"])
    assert answer.status_code == 200
    return picture_of(answer.content)


def test_open_webui_generates(start: Start) -> None:
    body = {
        "model": "gpt-image-1",
        "prompt": PROMPT,
        "n": 1,
        "size": "512x512",
        "response_format": "b64_json",
    }
    (item,) = generate(start(), body)["data"]
    # It takes the address when there is one, and else stores the bytes as a PNG.
    assert "url" not in item
    picture = decoded(item)
    assert (picture.format, picture.size) == ("PNG", (512, 512))


@pytest.mark.parametrize("count", [1, 2])
def test_open_webui_edits(start: Start, count: int) -> None:
    name = "image" if count == 1 else "image[]"
    files = [(name, (f"image_{i}.png", PNG, "image/png")) for i in range(count)]
    fields = {"model": "gpt-image-1", "prompt": PROMPT, "n": "1", "size": "512x512"}
    (item,) = edit(start(), fields, files)["data"]
    assert decoded(item).format == "PNG"


def test_librechat_with_gpt_image(start: Start) -> None:
    client = start()
    body = {
        "prompt": PROMPT,
        "model": "gpt-image-1",
        "n": 1,
        "background": "auto",
        "output_format": "png",
        "quality": "auto",
        "size": "auto",
    }
    assert decoded(generate(client, body)["data"][0]).size == (64, 64)
    # It closes its stream of events by itself, and asks for none here.
    fields = {
        "model": "gpt-image-1",
        "prompt": PROMPT,
        "n": "1",
        "background": "auto",
        "quality": "auto",
        "size": "auto",
    }
    edited = edit(client, fields, [("image[]", ("a.png", PNG, "image/png"))])
    assert decoded(edited["data"][0]).format == "PNG"


def test_librechat_with_dall_e_3(start: Start) -> None:
    client = start()
    body = {
        "model": "dall-e-3",
        "prompt": PROMPT,
        "quality": "standard",
        "style": "vivid",
        "size": "1024x1024",
        "n": 1,
    }
    (item,) = generate(client, body)["data"]
    # It looks for the picture's name in the address.
    assert item["url"].rpartition("/")[2].endswith(".png")
    assert "?" not in item["url"]
    assert fetched(client, item).size == (1024, 1024)


@pytest.mark.parametrize("seed", [None, 42])
def test_lobechat(start: Start, seed: int | None) -> None:
    body = {
        "model": "flux",
        "n": 1,
        "prompt": PROMPT,
        "seed": seed,
        "size": "1024x768",
        "width": 512,
        "height": 384,
        "steps": 20,
        "cfg": 3.5,
    }
    answer = generate(start(), body)
    assert decoded(answer["data"][0]).size == (512, 384)
    assert seed is None or answer["data"][0]["seed"] == 42
    assert "guidance" not in answer


def test_langchain_dall_e_wrapper(start: Start) -> None:
    client = start()
    body = {"prompt": PROMPT, "n": 2, "size": "1024x1024", "model": "dall-e-2"}
    items = generate(client, {**body, "quality": "standard"})["data"]
    assert "\n".join(item["url"] for item in items).count("\n") == 1
    assert all(fetched(client, item).size == (1024, 1024) for item in items)


def test_llama_index(start: Start) -> None:
    client = start()
    body = {
        "prompt": PROMPT,
        "n": 1,
        "model": "dall-e-3",
        "size": "1024x1024",
        "quality": "standard",
        "style": "vivid",
        "response_format": "url",
    }
    (item,) = generate(client, body)["data"]
    assert fetched(client, item).size == (1024, 1024)


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1"])
def test_n8n(start: Start, model: str) -> None:
    client = start()
    listed = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    offered = [name for name in listed if name.startswith(("dall-", "gpt-image"))]
    assert model in offered
    body: dict[str, Any] = {"prompt": PROMPT, "model": model, "n": 1, "size": "1024x1024"}
    if not model.startswith("gpt-image"):
        body |= {"response_format": "b64_json", "quality": "standard", "style": "vivid"}
    (item,) = generate(client, body)["data"]
    assert decoded(item).size == (1024, 1024)


def test_the_ai_sdk(start: Start) -> None:
    client = start()
    body = {
        "model": "flux",
        "prompt": PROMPT,
        "n": 2,
        "size": "1792x1024",
        "response_format": "b64_json",
    }
    items = generate(client, body)["data"]
    assert [decoded(item).size for item in items] == [(1792, 1024)] * 2
    files = [
        ("image", ("blob", io.BytesIO(PNG), "application/octet-stream")),
        ("image", ("blob", io.BytesIO(PNG), "application/octet-stream")),
    ]
    (item,) = edit(client, {"model": "flux", "prompt": PROMPT, "n": "1"}, files)["data"]
    assert "b64_json" in item


def test_a_base_address_without_its_version(start: Start) -> None:
    body = {"model": "gpt-image-1", "prompt": PROMPT}
    assert generate(start(), body, path="")["data"]
