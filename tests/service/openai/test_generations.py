"""``POST /v1/images/generations``: every field's meaning, and its refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.service.conftest import Start, error_of
from tests.service.openai.conftest import Images, same

SMALL = {"prompt": "a red fox", "size": "64x96", "seed": 7}


def ask(client: TestClient, path: str = "/v1/images/generations", **body: Any) -> Images:
    return Images.of(client, client.post(path, json={**SMALL, **body}))


def refusal(client: TestClient, status: int = 400, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/images/generations", json={**SMALL, **body})
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    return error


def test_the_answer_has_the_shape_of_the_contract(client: TestClient) -> None:
    made = ask(client, n=2, negative_prompt="blurry", guidance_scale=3, quality="high")
    body = made.body
    assert [picture.size for picture in made.pictures] == [(64, 96)] * 2
    assert [picture.format for picture in made.pictures] == ["PNG"] * 2
    assert [item["seed"] for item in body["data"]] == [7, 8]
    assert body["created"] > 1_700_000_000
    assert {name: body[name] for name in ("background", "output_format", "quality", "size")} == {
        "background": "opaque",
        "output_format": "png",
        "quality": "high",
        "size": "64x96",
    }
    usage = body["usage"]
    # 64x96 pixels are 4x6 tokens, twice.
    assert usage["output_tokens"] == usage["output_tokens_details"]["image_tokens"] == 48
    text = usage["input_tokens_details"]["text_tokens"]
    assert usage["input_tokens_details"]["image_tokens"] == 0
    assert text > 3
    assert (usage["input_tokens"], usage["total_tokens"]) == (text, text + 48)
    assert body["timings"]["denoise_ms"] > 0
    assert body["model"] == "tiny"
    assert body["warnings"] == [
        "guidance has no effect on a distilled model",
        "negative_prompt has no effect on a distilled model",
    ]


@pytest.mark.parametrize(
    ("given", "is_url"),
    [
        ({}, False),
        ({"model": "gpt-image-1"}, False),
        ({"model": "black-forest-labs/FLUX.2-klein-4B"}, False),
        ({"model": "dall-e-2"}, True),
        ({"model": "dall-e-3"}, True),
        ({"model": "dall-e-3", "response_format": "b64_json"}, False),
        ({"model": "dall-e-3", "response_format": None}, True),
        ({"response_format": "base64"}, False),
        ({"response_format": "url"}, True),
        ({"model": "gpt-image-1", "response_format": "url"}, True),
    ],
)
def test_pictures_come_as_text_or_as_addresses(
    client: TestClient, given: dict[str, Any], is_url: bool
) -> None:
    (item,) = ask(client, **given).body["data"]
    assert ("url" in item) is is_url


@pytest.mark.parametrize(
    ("given", "file_format", "ending"),
    [
        ({}, "PNG", ".png"),
        ({"output_format": "png"}, "PNG", ".png"),
        ({"output_format": "jpeg"}, "JPEG", ".jpg"),
        ({"output_format": "jpg"}, "JPEG", ".jpg"),
        ({"output_format": "webp"}, "WEBP", ".webp"),
    ],
)
def test_the_format_is_the_one_asked_for(
    client: TestClient, given: dict[str, Any], file_format: str, ending: str
) -> None:
    made = ask(client, response_format="url", **given)
    assert made.pictures[0].format == file_format
    assert made.body["output_format"] == file_format.lower()
    assert made.body["data"][0]["url"].endswith(ending)


def test_compression_is_the_files_quality(client: TestClient) -> None:
    def size(**given: Any) -> int:
        return len(ask(client, output_format="jpeg", **given).body["data"][0]["b64_json"])

    assert size(output_compression=0) < size(output_compression=50) < size(output_compression=100)
    assert size() == size(output_compression=100)
    assert ask(client, output_compression=50).body["warnings"] == [
        "output_compression has no effect on png, which is lossless"
    ]


def test_null_means_left_out(client: TestClient) -> None:
    names = client.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"][
        "requestBody"
    ]["content"]["application/json"]["schema"]["properties"]
    made = Images.of(
        client,
        client.post(
            "/v1/images/generations",
            json={**dict.fromkeys(names), "prompt": "a red fox"},
        ),
    )
    assert made.pictures[0].size == (64, 64)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"size": "auto"}, (64, 64)),
        ({"size": None}, (64, 64)),
        ({"size": ""}, (64, 64)),
        ({"size": "96x64"}, (96, 64)),
        ({"width": 80, "height": 112}, (80, 112)),
        ({"width": 80.0, "height": 112.0}, (80, 112)),
        ({"size": "auto", "width": 80, "height": 112}, (80, 112)),
        ({"width": None, "height": None}, (64, 96)),
        ({"width": 80}, (80, 96)),
        ({"size": None, "height": 80}, (64, 80)),
    ],
)
def test_sizes(client: TestClient, given: dict[str, Any], size: tuple[int, int]) -> None:
    made = ask(client, **given)
    assert made.pictures[0].size == size
    assert made.body["size"] == f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("name", ["num_inference_steps", "steps", "step"])
def test_steps_have_three_names(client: TestClient, name: str) -> None:
    assert not same(ask(client).pictures[0], ask(client, **{name: 2}).pictures[0])


def test_of_several_names_the_first_counts_and_the_others_are_told(client: TestClient) -> None:
    made = ask(client, step=4, steps=2, num_inference_steps=2)
    assert made.body["warnings"] == ["step has no effect beside num_inference_steps"]
    assert same(made.pictures[0], ask(client, steps=2).pictures[0])


@pytest.mark.parametrize("name", ["guidance_scale", "guidance", "cfg_scale", "cfg"])
def test_guidance_has_four_names(client: TestClient, name: str) -> None:
    assert ask(client, **{name: 2.5}).body["warnings"] == [
        "guidance has no effect on a distilled model"
    ]


def test_a_seed_gives_the_picture_of_the_native_route(client: TestClient) -> None:
    native = client.post(
        "/v1/generate", json={"prompt": "a red fox", "width": 64, "height": 96, "seed": 7}
    ).json()
    assert ask(client).body["data"][0]["b64_json"] == native["images"][0]["b64"]


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_draws_one(client: TestClient, seed: int | None) -> None:
    first, second = (ask(client, seed=seed).body["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert ask(client, seed=first["seed"]).body["data"][0] == first


def test_fields_without_a_meaning_are_ignored(client: TestClient) -> None:
    strange = {
        "style": "vivid",
        "moderation": "low",
        "user": 12,
        "safety_identifier": {"any": "thing"},
        "input_fidelity": "high",
        "made_up": [1, 2],
        "background": "opaque",
    }
    assert same(ask(client, **strange).pictures[0], ask(client).pictures[0])


def test_partial_images_without_a_stream_are_said_to_do_nothing(client: TestClient) -> None:
    assert ask(client, partial_images=2).body["warnings"] == [
        "partial_images has no effect without stream"
    ]


@pytest.mark.parametrize(
    "path", ["/images/generations", "/v1/images/generations"], ids=["short", "long"]
)
def test_the_prefix_may_be_left_out(client: TestClient, path: str) -> None:
    assert ask(client, path).pictures[0].size == (64, 96)


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": "x" * 32_001}, "prompt", "at most 32000 characters"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"n": 0}, "n", "n must be from 1 to 10; got 0"),
        ({"n": 11}, "n", "n must be from 1 to 10; got 11"),
        ({"n": "2"}, "n", "must be a valid integer"),
        ({"size": "big"}, "size", "size must be auto or WIDTHxHEIGHT"),
        ({"size": "1000x1024"}, "size", "size: width must be a multiple of 16"),
        ({"size": "1024x1000"}, "size", "size: height must be a multiple of 16"),
        ({"size": "64x99999"}, "size", "from 64 to 2048"),
        ({"width": 70, "height": 64}, "width", "width must be a multiple of 16"),
        ({"size": "big", "width": 64, "height": 64}, "size", "size must be auto"),
        ({"steps": 0}, "steps", "steps must be from 1 to 200"),
        ({"num_inference_steps": 201}, "num_inference_steps", "num_inference_steps must be from"),
        ({"steps": 2, "step": 0}, "step", "step must be from 1 to 200"),
        ({"cfg": -1}, "cfg", "cfg must be from 0 to 30"),
        ({"guidance_scale": 31}, "guidance_scale", "guidance_scale must be from 0 to 30"),
        ({"seed": -2}, "seed", "seed must be from 0"),
        ({"seed": 2**63}, "seed", "seed must be from 0"),
        ({"quality": "best"}, "quality", "must be 'auto', 'low'"),
        ({"response_format": "file"}, "response_format", "must be 'url', 'b64_json'"),
        ({"output_format": "gif"}, "output_format", "must be 'png', 'jpeg'"),
        ({"output_compression": 101}, "output_compression", "from 0 to 100; got 101"),
        ({"output_compression": -1}, "output_compression", "from 0 to 100; got -1"),
        ({"background": "transparent"}, "background", "must be auto or opaque"),
        ({"partial_images": 4, "stream": True}, "partial_images", "from 0 to 3; got 4"),
        ({"partial_images": -1}, "partial_images", "from 0 to 3; got -1"),
    ],
)
def test_a_wrong_value_is_refused_under_its_own_name(
    client: TestClient, given: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(client, **given)
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert says in error["message"]


def test_a_missing_prompt_is_named(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"n": 1})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "missing_required_parameter")
    assert error["param"] == "prompt"


def test_only_json_is_read(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", data={"prompt": "x"})
    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["message"]


def test_the_model_may_have_to_be_one_that_there_is(start: Start) -> None:
    client = start(strict_model_names=True)
    for name in ("fake-model", "black-forest-labs/fake-model", "dall-e-2", "", None):
        assert ask(client, model=name, response_format="b64_json").pictures
    error = refusal(client, 404, model="sdxl")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "there are fake-model, dall-e-2, dall-e-3, gpt-image-1" in error["message"]


def test_faults_of_the_device_say_whether_to_try_again(start: Start) -> None:
    client = start()
    answer = client.post("/v1/images/generations", json={"prompt": "oom"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false")
    assert error_of(answer)["type"] == "server_error"
    assert ask(client, prompt="next").pictures


def test_models_are_listed_and_found(client: TestClient) -> None:
    for prefix in ("/v1", ""):
        listed = client.get(f"{prefix}/models").json()
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == [
            "tiny",
            "dall-e-2",
            "dall-e-3",
            "gpt-image-1",
        ]
        assert all(
            set(model) == {"id", "object", "created", "owned_by"} and model["object"] == "model"
            for model in listed["data"]
        )
        for name in ("tiny", "gpt-image-1", "black-forest-labs/tiny", "black-forest-labs%2Ftiny"):
            found = client.get(f"{prefix}/models/{name}")
            assert found.status_code == 200
            assert found.json()["id"] == name.replace("%2F", "/")
        missing = client.get(f"{prefix}/models/sdxl")
        assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_the_listed_aliases_are_a_setting(start: Start) -> None:
    client = start(model_aliases=("flux",))
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [
        "fake-model",
        "flux",
    ]


def test_the_documented_sizes_are_the_ones_that_are_drawn(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"][
        "requestBody"
    ]["content"]["application/json"]["schema"]["properties"]["size"]
    for size in ("auto", "", "64x64", "2048x1040", "1792x1024", "256x256"):
        assert re.search(schema["pattern"], size)
    for size in ("63x64", "64x65", "2064x64", "64", "x", "64x64 ", "auto64x64"):
        assert not re.search(schema["pattern"], size)
