"""``POST /v1/generate`` with a real tiny model: pictures, bytes, references, masks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app, create_engine
from fluxcore import FluxPipeline
from tests.service.conftest import encode, error_of, settings_for_tests, wait_until

SIZE = {"width": 64, "height": 96}
PICTURE = Image.effect_noise((80, 64), 60).convert("RGB")


@pytest.fixture(scope="module")
def client(tiny_pipeline: FluxPipeline) -> Iterator[TestClient]:
    """A service around the tiny model."""
    settings = settings_for_tests(default_width=64, default_height=64)
    engine = create_engine(settings, lambda progress: tiny_pipeline)
    with TestClient(create_app(settings, engine)) as client:
        wait_until(lambda: engine.status().is_ready)
        yield client


def ask(client: TestClient, accept: str | None = None, **body: Any) -> httpx2.Response:
    headers = {} if accept is None else {"Accept": accept}
    answer = client.post("/v1/generate", json={"prompt": "a red fox", **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def pictures_of(answer: httpx2.Response) -> list[Image.Image]:
    found = []
    for item in answer.json()["images"]:
        picture = Image.open(io.BytesIO(base64.b64decode(item["b64"], validate=True)))
        picture.load()
        found.append(picture)
    return found


def test_json_holds_the_picture_its_seed_and_how_long_it_took(client: TestClient) -> None:
    answer = ask(client, **SIZE, seed=42, negative_prompt="blurry", guidance=3.0)
    body = answer.json()
    assert answer.headers["content-type"] == "application/json"
    assert body["id"] == answer.headers["x-request-id"]
    assert body["model"] == "tiny"
    assert body["created"] > 1_700_000_000
    (item,) = body["images"]
    assert {name: item[name] for name in ("seed", "width", "height", "format")} == {
        "seed": 42,
        "width": 64,
        "height": 96,
        "format": "png",
    }
    (picture,) = pictures_of(answer)
    assert (picture.format, picture.size, picture.mode) == ("PNG", (64, 96), "RGB")
    assert body["params"] == {
        "width": 64,
        "height": 96,
        "steps": 4,
        "guidance": None,
        "schedule": "flux",
        "power_alpha": None,
        "negative_prompt": "blurry",
        "references": 0,
        "strength": None,
        "n": 1,
    }
    stages = ("queue", "text", "denoise", "decode", "paused", "pack", "total")
    assert set(body["timings"]) == {f"{stage}_ms" for stage in stages}
    assert all(ms >= 0 for ms in body["timings"].values())
    assert body["timings"]["total_ms"] >= body["timings"]["denoise_ms"]
    assert body["warnings"] == [
        "guidance has no effect on a distilled model",
        "negative_prompt has no effect on a distilled model",
    ]


def test_a_second_request_for_the_same_prompt_hits_the_cache(client: TestClient) -> None:
    ask(client, prompt="seen before")
    assert ask(client, prompt="seen before").json()["cache_hit"] is True
    assert ask(client, prompt="never seen before").json()["cache_hit"] is False


def test_equal_requests_give_equal_files(client: TestClient) -> None:
    first, second = (ask(client, seed=3).json()["images"][0]["b64"] for _ in range(2))
    assert first == second
    assert ask(client, seed=4).json()["images"][0]["b64"] != first


def test_a_drawn_seed_is_told_and_gives_the_same_picture_again(client: TestClient) -> None:
    first = ask(client)
    seed = first.json()["images"][0]["seed"]
    assert ask(client).json()["images"][0]["seed"] != seed
    assert ask(client, seed=seed).json()["images"] == first.json()["images"]


def test_picture_i_of_n_is_the_one_of_seed_plus_i(client: TestClient) -> None:
    answer = ask(client, seed=10, n=3)
    assert [item["seed"] for item in answer.json()["images"]] == [10, 11, 12]
    third = ask(client, seed=12)
    assert answer.json()["images"][2]["b64"] == third.json()["images"][0]["b64"]


@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
def test_accept_gives_the_bytes(client: TestClient, picture_format: str) -> None:
    answer = ask(client, f"image/{picture_format}", **SIZE, seed=42, guidance=3.0)
    assert answer.headers["content-type"] == f"image/{picture_format}"
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.format, picture.size) == (picture_format.upper(), (64, 96))
    headers = answer.headers
    assert headers["x-fluxd-seed"] == "42"
    assert headers["x-fluxd-size"] == "64x96"
    assert headers["x-fluxd-steps"] == "4"
    assert headers["x-fluxd-model"] == "tiny"
    assert headers["x-fluxd-cache-hit"] in ("true", "false")
    assert headers["x-fluxd-warning"] == "guidance has no effect on a distilled model"
    assert "denoise;dur=" in headers["server-timing"]
    assert headers["content-disposition"] == f'inline; filename="fluxd-42.{picture_format}"'


def test_bytes_and_json_hold_the_same_picture(client: TestClient) -> None:
    as_json = ask(client, seed=5, output_format="webp", quality=80).json()["images"][0]
    as_bytes = ask(client, "image/*", seed=5, output_format="webp", quality=80)
    assert base64.b64decode(as_json["b64"]) == as_bytes.content


def test_the_png_says_how_it_was_made(client: TestClient) -> None:
    (picture,) = pictures_of(ask(client, prompt="ein Füchslein 🦊", seed=42, **SIZE))
    assert picture.text["parameters"].splitlines()[0] == "ein Füchslein 🦊"
    assert "Seed: 42, Size: 64x96, Model: tiny, Version: fluxd" in picture.text["parameters"]


def test_quality_is_said_to_be_without_effect_on_png(client: TestClient) -> None:
    assert ask(client, quality=50).json()["warnings"] == [
        "quality has no effect on png, which is lossless"
    ]
    assert ask(client, quality=50, output_format="jpeg").json()["warnings"] == []


def test_a_long_prompt_is_cut_and_says_so(client: TestClient) -> None:
    (warning,) = ask(client, prompt="fox " * 3000).json()["warnings"]
    assert "tokens were not used" in warning


def test_references_change_the_picture_and_give_it_their_size(client: TestClient) -> None:
    reference = encode(PICTURE)
    alone = ask(client, seed=1, width=80, height=64)
    drawn = ask(client, seed=1, images=[reference])
    assert drawn.json()["params"]["references"] == 1
    assert "references_ms" in drawn.json()["timings"]
    assert pictures_of(drawn)[0].size == (80, 64)
    assert pictures_of(drawn)[0].tobytes() != pictures_of(alone)[0].tobytes()
    two = ask(
        client, seed=1, images=[reference, f"data:image/jpeg;base64,{encode(PICTURE, 'JPEG')}"]
    )
    assert two.json()["params"]["references"] == 2
    assert pictures_of(two)[0].tobytes() != pictures_of(drawn)[0].tobytes()


def test_a_mask_keeps_what_it_does_not_mark(client: TestClient) -> None:
    mask = Image.new("L", (80, 64))
    mask.paste(255, (40, 0, 80, 64))
    answer = ask(client, seed=1, images=[encode(PICTURE)], mask=encode(mask), strength=0.75)
    assert answer.json()["params"]["strength"] == 0.75
    other = ask(client, seed=1, images=[encode(PICTURE)], mask=encode(mask), strength=0.5)
    assert pictures_of(answer)[0].size == (80, 64)
    assert pictures_of(answer)[0].tobytes() != pictures_of(other)[0].tobytes()


def test_a_mask_does_not_go_with_a_size(client: TestClient) -> None:
    body = {"prompt": "x", "images": [encode(PICTURE)], "mask": encode(PICTURE), "width": 64}
    answer = client.post("/v1/generate", json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "width")


@pytest.mark.parametrize(
    "changed", [{"schedule": "linear"}, {"schedule": "power"}, {"steps": 3}, {"width": 80}]
)
def test_parameters_have_an_effect(client: TestClient, changed: dict[str, Any]) -> None:
    plain = pictures_of(ask(client, seed=1))[0]
    other = pictures_of(ask(client, seed=1, **changed))[0]
    assert plain.tobytes() != other.tobytes()


def test_power_alpha_has_an_effect_and_is_told(client: TestClient) -> None:
    two, three = (ask(client, seed=1, schedule="power", power_alpha=alpha) for alpha in (2.0, 3.0))
    assert three.json()["params"]["power_alpha"] == 3.0
    assert pictures_of(two)[0].tobytes() != pictures_of(three)[0].tobytes()


def test_one_side_is_filled_in_from_the_settings(client: TestClient) -> None:
    assert pictures_of(ask(client, width=128))[0].size == (128, 64)
    assert pictures_of(ask(client, height=128))[0].size == (64, 128)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"size": "96x80"}, (96, 80)),
        ({"size": "auto"}, (64, 64)),
        ({"aspect_ratio": "1:1"}, (64, 64)),
        ({"aspect_ratio": "16:9", "megapixels": 0.0147}, (160, 96)),
        ({"aspect_ratio": "9:16", "megapixels": 0.0147}, (96, 160)),
        ({"aspect_ratio": "1.91:1", "megapixels": 0.01}, (144, 80)),
    ],
)
def test_a_size_has_three_ways_to_be_given(
    client: TestClient, given: dict[str, Any], size: tuple[int, int]
) -> None:
    answer = ask(client, **given)
    assert pictures_of(answer)[0].size == size
    assert (answer.json()["params"]["width"], answer.json()["params"]["height"]) == size


def test_a_shape_holds_for_references_but_not_under_a_mask(client: TestClient) -> None:
    reference = encode(PICTURE)
    assert pictures_of(ask(client, images=[reference], size="64x96"))[0].size == (64, 96)
    assert pictures_of(ask(client, images=[reference], size="auto"))[0].size == PICTURE.size
    mask = encode(Image.new("L", PICTURE.size, 255))
    for name, value in (("size", "80x64"), ("aspect_ratio", "5:4")):
        body = {"prompt": "x", "images": [reference], "mask": mask, name: value}
        error = error_of(client.post("/v1/generate", json=body))
        assert error["param"] == name and "does not go with a mask" in error["message"]
    body = {"prompt": "x", "images": [reference], "mask": mask, "size": "auto"}
    assert client.post("/v1/generate", json=body).status_code == 200


def test_previews_without_a_stream_are_said_to_do_nothing(client: TestClient) -> None:
    assert ask(client, previews=2).json()["warnings"] == ["previews has no effect without stream"]


def test_a_job_too_large_for_memory_is_not_to_be_repeated_and_small_ones_work(
    client: TestClient, tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = tiny_pipeline.transformer.forward

    def limited(img: torch.Tensor, *others: Any) -> torch.Tensor:
        if img.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")
        return forward(img, *others)

    monkeypatch.setattr(tiny_pipeline.transformer, "forward", limited)
    for _ in range(2):
        answer = client.post("/v1/generate", json={"prompt": "x", "width": 256, "height": 256})
        assert answer.status_code == 507
        assert error_of(answer)["code"] == "out_of_memory"
        assert answer.headers["x-should-retry"] == "false"
        assert pictures_of(ask(client, width=64, height=64))[0].size == (64, 64)
    assert client.get("/health").status_code == 200


def test_a_large_body_is_parsed_as_a_small_one(client: TestClient) -> None:
    noise = Image.effect_noise((400, 400), 90).convert("RGB")
    reference = encode(noise)
    assert len(reference) > 64 * 1024
    assert ask(client, images=[reference], **SIZE).json()["params"]["references"] == 1
