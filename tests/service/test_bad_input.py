"""What a request can get wrong: each is a 4xx that says what is allowed, and the next works."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.service.conftest import Start, encode, error_of

PICTURE = Image.effect_noise((64, 96), 60).convert("RGB")
PNG = encode(PICTURE)
JPEG = encode(PICTURE, "JPEG")
TRUNCATED_JPEG = base64.b64encode(base64.b64decode(JPEG)[:-300]).decode()
GIF = encode(PICTURE, "GIF")
JSON_TYPE = {"Content-Type": "application/json"}


def refusal(client: Any, **fields: Any) -> dict[str, Any]:
    """The error of a request that must be refused, after which the next one must work."""
    size = {} if {"size", "aspect_ratio"} & fields.keys() else {"width": 64, "height": 64}
    body = {"prompt": "a red fox", **size, **fields}
    return checked(client, client.post("/v1/generate", content=json.dumps(body), headers=JSON_TYPE))


def checked(client: Any, answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    works = client.post("/v1/generate", json={"prompt": "next", "width": 64, "height": 64})
    assert works.status_code == 200
    return error


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "must not be empty"),
        ("prompt", " \n\t", "must not be empty"),
        ("prompt", "x" * 32_001, "at most 32000 characters; got 32001"),
        ("prompt", None, "must be a valid string"),
        ("prompt", ["secret"], "must be a valid string; got list"),
        ("negative_prompt", "x" * 32_001, "at most 32000"),
        ("width", 500, "multiple of 16 from 64 to 2048; got 500 (nearest: 496, 512)"),
        ("height", 500, "(nearest: 496, 512)"),
        ("width", 100_000, "from 64 to 2048; got 100000"),
        ("height", 10_000, "from 64 to 2048; got 10000"),
        ("width", 0, "from 64 to 2048"),
        ("width", -512, "from 64 to 2048"),
        ("width", "512", "must be a valid integer; got '512'"),
        ("width", 512.5, "must be a valid integer; got 512.5"),
        ("width", 1e300, "from 64 to 2048"),
        ("width", True, "must be a valid integer; got True"),
        ("steps", 0, "from 1 to 200; got 0"),
        ("steps", 201, "from 1 to 200; got 201"),
        ("seed", -1, "from 0 to 9223372036854775807; got -1"),
        ("seed", 2**63, "from 0 to 9223372036854775807"),
        ("seed", 10**40, "from 0 to 9223372036854775807"),
        ("guidance", float("nan"), "must be a finite number"),
        ("guidance", float("inf"), "must be a finite number"),
        ("guidance", -1, "from 0 to 30; got -1"),
        ("guidance", "4", "must be a valid number; got '4'"),
        ("n", 0, "from 1 to 10; got 0"),
        ("n", 11, "from 1 to 10; got 11"),
        ("schedule", "karras", "must be 'flux', 'linear' or 'power'; got 'karras'"),
        ("power_alpha", 0, "above 0 to 10"),
        ("strength", 0.5, "give a mask"),
        ("output_format", "gif", "must be 'png', 'jpeg' or 'webp'"),
        ("quality", 0, "greater than or equal to 1"),
        ("quality", 101, "less than or equal to 100"),
        ("size", "64", "size: a size is written WIDTHxHEIGHT"),
        ("size", "64x70", "size: height must be a multiple of 16"),
        ("size", "", "size: a size is written WIDTHxHEIGHT"),
        ("aspect_ratio", "wide", "is written WIDTH:HEIGHT, such as 16:9; got 'wide'"),
        ("aspect_ratio", "0:9", "is written WIDTH:HEIGHT"),
        ("aspect_ratio", "16:0.0", "is written WIDTH:HEIGHT"),
        ("aspect_ratio", "100:1", "640x0; each side must be from 64 to 2048"),
        ("megapixels", 1, "megapixels needs aspect_ratio"),
        ("previews", 11, "from 0 to 10; got 11"),
        ("previews", -1, "from 0 to 10; got -1"),
        ("priority", "urgent", "must be 'interactive', 'normal' or 'batch'"),
        ("timeout_s", 0, "above 0 to 600; got 0"),
        ("timeout_s", 601, "above 0 to 600; got 601"),
        ("timeout_s", float("nan"), "must be a finite number"),
        ("stream", "yes", "must be a valid boolean"),
        ("images", "not a list", "must be a valid array; got str"),
        ("images", [PNG] * 11, "at most 10 images are allowed; got 11"),
        ("mask", PNG, "a mask needs a picture to paint in"),
    ],
)
def test_a_wrong_value_names_its_field_and_what_is_allowed(
    start: Start, field: str, value: Any, says: str
) -> None:
    error = refusal(start(), **{field: value})
    assert error["param"] == field
    assert error["code"] == "invalid_value"
    assert says in error["message"]
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"size": "64x64", "width": 64}, "size", "size does not go with width"),
        ({"size": "64x64", "height": 64}, "size", "size does not go with height"),
        ({"aspect_ratio": "1:1", "width": 64}, "aspect_ratio", "does not go with width"),
        ({"aspect_ratio": "1:1", "size": "64x64"}, "aspect_ratio", "does not go with size"),
        ({"aspect_ratio": "1:1", "megapixels": 0}, "megapixels", "above 0 to 4.1943; got 0"),
        ({"aspect_ratio": "1:1", "megapixels": 5}, "megapixels", "above 0 to 4.1943; got 5"),
        ({"aspect_ratio": "1:2", "megapixels": 4}, "aspect_ratio", "is 1408x2832; each side"),
        ({"aspect_ratio": "1:1", "megapixels": 1e-9}, "aspect_ratio", "is 0x0; each side"),
        ({"size": "64x64", "images": [PNG], "mask": PNG}, "size", "does not go with a mask"),
    ],
)
def test_a_size_is_given_in_one_way(
    start: Start, fields: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(start(), **fields)
    assert error["param"] == param
    assert says in error["message"]


def test_giant_sizes_are_refused_for_their_width_first(start: Start) -> None:
    error = refusal(start(), width=100_000, height=10_000)
    assert error["param"] == "width"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("!!!!", "is not valid base64"),
        (PNG[:-1], "is not valid base64"),
        (f"{PNG[:40]} {PNG[40:]}", "is not valid base64"),
        (PNG[:40].replace("/", "_") + "-_" + PNG[40:], "is not valid base64"),
        ("cafй", "is not valid base64"),
        ("", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png,abc", "must be a data URL in base64"),
        ("https://example.org/cat.png", "addresses are not fetched"),
        ("file:///etc/passwd", "addresses are not fetched"),
        (base64.b64encode(b"hello").decode(), "is not a PNG, JPEG or WebP picture"),
        (GIF, "is not a PNG, JPEG or WebP picture"),
        (TRUNCATED_JPEG, "is truncated or corrupt"),
        (base64.b64encode(base64.b64decode(PNG)[:200]).decode(), "is truncated or corrupt"),
        (encode(Image.new("1", (6000, 6000))), "has 6000x6000 pixels; at most 25000000"),
        (encode(Image.new("1", (10_000, 10_000))), "more than 25000000 pixels"),
        (encode(Image.new("RGB", (32, 32))), "at least 64 pixels on each side"),
        (encode(Image.new("RGB", (64, 640))), "at most 8:1"),
    ],
)
def test_a_wrong_picture_is_named(start: Start, text: str, says: str) -> None:
    error = refusal(start(), images=[PNG, text])
    assert says in error["message"]
    assert error["param"] == "images[1]" and error["message"].startswith("images[1] ")


def test_a_wrong_mask_is_named(start: Start) -> None:
    client = start()
    for mask, says in (
        ("!", "mask is not valid base64"),
        (TRUNCATED_JPEG, "mask is truncated or corrupt"),
        (encode(Image.new("L", (64, 96))), "mask marks nothing to draw again"),
        (encode(Image.new("L", (96, 64), 255)), "mask must have the size of the first reference"),
    ):
        body = {"prompt": "x", "images": [PNG], "mask": mask}
        error = checked(client, client.post("/v1/generate", json=body))
        assert (error["param"], says in error["message"]) == ("mask", True), error


def test_a_cheap_mistake_is_found_before_pictures_are_decoded(start: Start) -> None:
    error = refusal(start(), steps=0, images=["not a picture"])
    assert error["param"] == "steps"


def test_references_can_be_forbidden(start: Start) -> None:
    error = refusal(start(max_references=0), images=[PNG])
    assert "at most 0 images are allowed; got 1" in error["message"]


def test_the_pixel_limit_is_a_setting(start: Start) -> None:
    error = refusal(start(max_image_pixels=5000), images=[PNG])
    assert "has 64x96 pixels; at most 5000 are allowed" in error["message"]


def test_the_byte_limit_is_a_setting(start: Start) -> None:
    big = Image.effect_noise((64, 64), 60).convert("RGB")
    error = refusal(
        start(max_image_bytes=2048), images=[encode(Image.new("L", (64, 64))), encode(big)]
    )
    assert error["param"] == "images[1]" and "at most 2048 are allowed" in error["message"]


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("widht", "did you mean 'width'?"),
        ("negative", "did you mean 'negative_prompt'?"),
        ("aspect", "did you mean 'aspect_ratio'?"),
        ("zzz", "known names: aspect_ratio, guidance, height, images,"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(
    start: Start, field: str, hint: str
) -> None:
    error = refusal(start(), **{field: 1})
    assert (error["code"], error["param"]) == ("unknown_parameter", field)
    assert f"unknown field '{field}'" in error["message"]
    assert hint in error["message"]


def test_a_missing_prompt_is_named(start: Start) -> None:
    client = start()
    error = checked(client, client.post("/v1/generate", json={"steps": 4}))
    assert (error["code"], error["param"]) == ("missing_required_parameter", "prompt")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 10_000, "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"prompt"', "must be a JSON object"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(start: Start, body: bytes, says: str) -> None:
    client = start()
    answer = client.post("/v1/generate", content=body, headers=JSON_TYPE)
    assert says in checked(client, answer)["message"]


@pytest.mark.parametrize(
    "sent", ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed", None]
)
def test_another_content_type_is_refused(start: Start, sent: str | None) -> None:
    client = start()
    headers = {} if sent is None else {"Content-Type": sent}
    answer = client.post("/v1/generate", content=b'{"prompt": "x"}', headers=headers)
    error = checked(client, answer, 415)
    assert "must be application/json or multipart/form-data; got" in error["message"]


def test_json_with_a_charset_is_taken(start: Start) -> None:
    body = b'{"prompt": "x", "width": 64, "height": 64}'
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert start().post("/v1/generate", content=body, headers=headers).status_code == 200


def test_a_body_larger_than_the_setting_is_refused(start: Start) -> None:
    client = start(max_body_bytes=2048)
    answer = client.post("/v1/generate", json={"prompt": "x" * 3000})
    error = checked(client, answer, 413)
    assert error["code"] == "body_too_large" and "2048 bytes" in error["message"]


def test_a_length_that_is_no_number_is_refused(start: Start) -> None:
    client = start()
    answer = client.post(
        "/v1/generate", content=b"{}", headers={**JSON_TYPE, "Content-Length": "-2"}
    )
    assert "Content-Length must be a number" in checked(client, answer)["message"]


def test_several_pictures_do_not_come_as_the_bytes_of_one(start: Start) -> None:
    client = start()
    answer = client.post(
        "/v1/generate", json={"prompt": "x", "n": 2}, headers={"Accept": "image/png"}
    )
    error = checked(client, answer)
    assert error["param"] == "n" and "n must be 1" in error["message"]


@pytest.mark.parametrize(
    ("accept", "output_format", "offers"),
    [
        ("text/html", None, "application/json, image/png, image/jpeg, image/webp"),
        ("image/jpeg", "png", "application/json, image/png with output_format png"),
        ("application/json;q=0", None, "application/json"),
    ],
)
def test_a_client_that_takes_nothing_we_have_is_told_what_we_have(
    start: Start, accept: str, output_format: str | None, offers: str
) -> None:
    client = start()
    body = {"prompt": "x", "output_format": output_format}
    answer = client.post("/v1/generate", json=body, headers={"Accept": accept})
    assert offers in checked(client, answer, 406)["message"]


def test_null_means_left_out(start: Start) -> None:
    body = {
        "prompt": "x",
        "negative_prompt": None,
        "width": None,
        "height": None,
        "steps": None,
        "guidance": None,
        "seed": None,
        "n": None,
        "schedule": None,
        "power_alpha": None,
        "images": None,
        "mask": None,
        "strength": None,
        "output_format": None,
        "quality": None,
        **dict.fromkeys(("size", "aspect_ratio", "megapixels", "stream", "previews")),
        **dict.fromkeys(("priority", "timeout_s")),
    }
    answer = start(default_width=128, default_height=64).post("/v1/generate", json=body)
    assert answer.status_code == 200
    used = answer.json()["params"]
    assert (used["width"], used["height"], used["n"]) == (128, 64, 1)
    assert answer.json()["images"][0]["format"] == "png"
