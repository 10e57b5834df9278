"""The official Python client over a real socket: what its users call and what they get."""

from __future__ import annotations

import base64
import io
import threading
import urllib.request
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from fluxcore import FluxPipeline
from tests.service.conftest import Live, StartLive, wait_until
from tests.service.fake_pipeline import FakePipeline
from tests.service.openai.conftest import MASK, PICTURE, PNG, picture_of


def client_of(live: Live, **given: object) -> OpenAI:
    options = {"base_url": f"{live.url}/v1", "api_key": "none", "timeout": 60.0, **given}
    return OpenAI(**options)  # type: ignore[arg-type]


@pytest.fixture
def drawn(start_live: StartLive, tiny_pipeline: FluxPipeline) -> Iterator[OpenAI]:
    """A client of a service around the tiny model."""
    live = start_live(
        load=lambda progress: tiny_pipeline,
        settings={"default_width": 64, "default_height": 64},
    )
    with client_of(live) as client:
        yield client


def test_generate(drawn: OpenAI) -> None:
    answer = drawn.images.generate(
        model="gpt-image-1",
        prompt="a red fox",
        n=2,
        size="auto",
        quality="high",
        output_format="webp",
        output_compression=80,
        background="opaque",
        moderation="low",
        user="somebody",
        extra_body={"seed": 7, "num_inference_steps": 2, "negative_prompt": "blurry"},
    )
    assert answer.data is not None and answer.usage is not None
    assert (answer.size, answer.output_format, answer.quality) == ("64x64", "webp", "high")
    assert answer.usage.output_tokens == 32
    assert answer.usage.input_tokens_details.text_tokens == answer.usage.input_tokens
    assert answer._request_id
    for item in answer.data:
        assert item.b64_json is not None and item.url is None
        assert picture_of(base64.b64decode(item.b64_json)).size == (64, 64)
    # What the service adds arrives as attributes.
    assert [item.model_extra["seed"] for item in answer.data if item.model_extra] == [7, 8]
    assert answer.model_extra is not None
    assert answer.model_extra["warnings"] == ["negative_prompt has no effect on a distilled model"]
    assert answer.model_extra["timings"]["denoise_ms"] > 0


def test_addresses(drawn: OpenAI) -> None:
    answer = drawn.images.generate(model="dall-e-3", prompt="a red fox", style="vivid")
    assert answer.data is not None
    (item,) = answer.data
    assert item.url is not None and item.b64_json is None
    # Without the key that the client sends to the service.
    with urllib.request.urlopen(item.url, timeout=60) as found:
        assert found.headers["Content-Type"] == "image/png"
        assert picture_of(found.read()).size == (64, 64)


def test_edit(drawn: OpenAI) -> None:
    named = io.BytesIO(PNG)
    named.name = "photo.png"
    shapes = [PNG, named, ("photo.png", PNG, "image/png"), [PNG], [PNG, PNG]]
    for image in shapes:
        answer = drawn.images.edit(
            image=image,  # type: ignore[arg-type]
            prompt="the same in winter",
            n=1,
            extra_body={"seed": 1},
        )
        assert answer.data is not None and answer.data[0].b64_json is not None
        assert picture_of(base64.b64decode(answer.data[0].b64_json)).size == PICTURE.size
    masked = drawn.images.edit(image=PNG, mask=MASK, prompt="a sun", input_fidelity="high")
    assert masked.data is not None and masked.data[0].b64_json is not None


def test_variation(drawn: OpenAI) -> None:
    with pytest.deprecated_call():
        answer = drawn.images.create_variation(image=PNG, n=2, response_format="b64_json")
    assert answer.data is not None and len(answer.data) == 2


def test_models(drawn: OpenAI) -> None:
    assert "gpt-image-1" in [model.id for model in drawn.models.list()]
    assert drawn.models.retrieve("tiny").object == "model"
    assert drawn.models.retrieve("black-forest-labs/tiny").id == "black-forest-labs/tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        drawn.models.retrieve("sdxl")
    assert caught.value.code == "model_not_found"


def test_errors_become_the_clients_own(start_live: StartLive) -> None:
    live = start_live()
    with client_of(live, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="x", size="1000x1000")  # type: ignore[call-overload]
        error = refused.value
        assert (error.param, error.code) == ("size", "invalid_value")
        assert error.type == "invalid_request_error"
        assert error.request_id
        with pytest.raises(openai.NotFoundError):
            client.post("/nothing", cast_to=object)
        with pytest.raises(openai.InternalServerError) as failed:
            client.images.generate(prompt="fail")
        assert failed.value.code == "internal_error"
        assert "secret" not in str(failed.value)


def test_what_would_fail_again_is_not_tried_again(start_live: StartLive) -> None:
    pipeline = FakePipeline()
    live = start_live(pipeline)
    with client_of(live) as client, pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="oom")
    assert pipeline.ran == ["oom"]


def test_a_full_queue_is_waited_for(start_live: StartLive) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    live = start_live(pipeline, settings={"queue_limit": 1})
    running = live.generate_later("running")
    wait_until(pipeline.started.is_set)
    waiting = live.generate_later("waiting")
    wait_until(lambda: live.depth == 1)
    with client_of(live, max_retries=0) as client, pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="refused")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    threading.Timer(0.5, pipeline.gate.set).start()
    with client_of(live, max_retries=5) as client:
        assert client.images.generate(prompt="patient").data
    assert running.answer().status_code == waiting.answer().status_code == 200


def test_a_client_that_gives_up_leaves_no_work_behind(start_live: StartLive) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    live = start_live(pipeline)
    with (
        client_of(live, timeout=1.0, max_retries=0) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.images.generate(prompt="too slow")
    wait_until(lambda: live.engine.status().running == 1)
    # The job ends at its next slice, without having been drawn.
    wait_until(lambda: live.engine._scheduler.active[0].cancelled is not None)
    pipeline.gate.set()
    wait_until(lambda: pipeline.abandoned == ["too slow"])
    assert pipeline.ended == []
