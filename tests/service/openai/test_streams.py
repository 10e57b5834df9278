"""Streams of the OpenAI routes: partial images, the end, errors, and clients that leave."""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from PIL import Image
from starlette.testclient import TestClient

from app.api import event_stream
from fluxcore import FluxPipeline
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S, Live, StartLive, error_of, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, as_drawn
from tests.service.openai.conftest import DATA_URL, PNG, picture_of, same

BODY = {"prompt": "a red fox", "size": "64x96", "seed": 7, "stream": True}


@dataclass
class Event:
    name: str
    data: dict[str, Any]


def events_of(text: str) -> list[Event]:
    """The events of a whole stream; comments are left out."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith(":"):
            continue
        name, data = lines
        assert name.startswith("event: ") and data.startswith("data: ")
        found.append(Event(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        assert found[-1].data["type"] == found[-1].name
    return found


def stream(client: TestClient, path: str = "generations", **body: Any) -> list[Event]:
    answer = client.post(f"/v1/images/{path}", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert "content-length" not in answer.headers
    return events_of(answer.text)


def picture(event: Event) -> Image.Image:
    return picture_of(base64.b64decode(event.data["b64_json"], validate=True))


def test_partial_images_come_first_and_then_the_picture(client: TestClient) -> None:
    events = stream(client, partial_images=2, num_inference_steps=6)
    assert [event.name for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.data["partial_image_index"] for event in events[:2]] == [0, 1]
    for event in events:
        data = event.data
        assert {name: data[name] for name in ("size", "quality", "background")} == {
            "size": "64x96",
            "quality": "auto",
            "background": "opaque",
        }
        assert data["output_format"] == "png"
        assert data["created_at"] > 1_700_000_000
        assert picture(event).size == (64, 96)
    assert not same(picture(events[0]), picture(events[2]))
    end = events[2].data
    assert (end["seed"], end["usage"]["output_tokens"]) == (7, 24)
    assert end["timings"]["denoise_ms"] > 0
    plain = client.post(
        "/v1/images/generations", json={**BODY, "stream": False, "num_inference_steps": 6}
    )
    assert end["b64_json"] == plain.json()["data"][0]["b64_json"]


def test_the_later_partial_image_is_the_nearer_one(client: TestClient) -> None:
    first, second, end = stream(client, partial_images=2, num_inference_steps=12)

    def difference(event: Event) -> float:
        pairs = zip(picture(event).tobytes(), picture(end).tobytes(), strict=True)
        return sum(abs(a - b) for a, b in pairs)

    assert difference(second) < difference(first)


def test_without_partial_images_only_the_end_comes(client: TestClient) -> None:
    assert [event.name for event in stream(client)] == ["image_generation.completed"]
    assert len(stream(client, partial_images=0)) == 1
    # A step is the least that a partial image can stand for.
    assert len(stream(client, partial_images=3, num_inference_steps=1)) == 1


def test_several_pictures_have_an_end_each(client: TestClient) -> None:
    events = stream(client, n=2, partial_images=1)
    partial = [event.data for event in events if event.name.endswith("partial_image")]
    ends = [event.data for event in events if event.name.endswith("completed")]
    assert [(data["image_index"], data["partial_image_index"]) for data in partial] == [
        (0, 0),
        (1, 0),
    ]
    assert [(data["image_index"], data["seed"]) for data in ends] == [(0, 7), (1, 8)]
    assert all(data["usage"]["output_tokens"] == 24 for data in ends)


def test_the_model_for_addresses_streams_bytes(client: TestClient) -> None:
    assert picture(stream(client, model="dall-e-3")[-1]).size == (64, 96)


def test_the_format_holds_for_all(client: TestClient) -> None:
    events = stream(client, partial_images=1, output_format="jpg", quality="low")
    assert [picture(event).format for event in events] == ["JPEG", "JPEG"]
    assert {event.data["output_format"] for event in events} == {"jpeg"}
    assert {event.data["quality"] for event in events} == {"low"}


def test_edits_have_names_of_their_own(client: TestClient) -> None:
    as_json = stream(client, "edits", images=[{"image_url": DATA_URL}], partial_images=1)
    assert [event.name for event in as_json] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    answer = client.post(
        "/v1/images/edits",
        data={"prompt": "x", "stream": "true", "partial_images": "1"},
        files=[("image", ("a.png", PNG))],
    )
    names = [event.name for event in events_of(answer.text)]
    assert names == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("given", "param"),
    [({"size": "1x1"}, "size"), ({"response_format": "url"}, "response_format")],
)
def test_what_can_be_refused_before_is(
    client: TestClient, given: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/images/generations", json={**BODY, **given})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


@pytest.fixture
def live(start_live: StartLive) -> Live:
    """A service that waits for its gate."""
    pipeline = FakePipeline()
    pipeline.close_gate()
    return start_live(pipeline)


@pytest.fixture
def sdk(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_python_client_reads_streams(
    start_live: StartLive, tiny_pipeline: FluxPipeline
) -> None:
    live = start_live(load=lambda progress: tiny_pipeline)
    with OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        drawn = client.images.generate(
            prompt="a red fox",
            model="gpt-image-1",
            stream=True,
            partial_images=2,
            extra_body={"width": 64, "height": 64},
        )
        types = []
        for event in drawn:
            types.append(event.type)
            assert picture_of(base64.b64decode(event.b64_json)).size == (64, 64)
            if event.type == "image_generation.completed":
                assert event.usage.total_tokens == (
                    event.usage.input_tokens + event.usage.output_tokens
                )
            else:
                assert event.partial_image_index == len(types) - 1
        assert types == [
            "image_generation.partial_image",
            "image_generation.partial_image",
            "image_generation.completed",
        ]
        edited = client.images.edit(image=PNG, prompt="in winter", stream=True, partial_images=1)
        assert [event.type for event in edited] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]


@pytest.mark.parametrize(("prompt", "code"), [("fail", "internal_error"), ("oom", "out_of_memory")])
def test_a_late_error_is_an_event(live: Live, sdk: OpenAI, prompt: str, code: str) -> None:
    live.pipeline.gate.set()
    with live.client() as client:
        answer = client.post("/v1/images/generations", json={**BODY, "prompt": prompt})
    assert answer.status_code == 200
    (event,) = events_of(answer.text)
    assert event.name == "error"
    assert set(event.data["error"]) == {"message", "type", "param", "code"}
    assert event.data["error"]["code"] == code
    assert "secret" not in answer.text
    with pytest.raises(openai.APIError) as caught:
        list(sdk.images.generate(prompt=prompt, stream=True))
    assert caught.value.code == code


def test_a_job_that_takes_too_long_is_ended_in_the_stream(start_live: StartLive) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    live = start_live(pipeline, settings={"request_timeout_s": 0.2})
    with live.client() as client:
        (event,) = events_of(client.post("/v1/images/generations", json=BODY).text)
    assert (event.name, event.data["error"]["code"]) == ("error", "timeout")
    pipeline.gate.set()
    wait_until(lambda: pipeline.abandoned == [BODY["prompt"]])


def test_the_end_of_the_service_is_told_to_those_who_wait(live: Live) -> None:
    running = live.generate_later("running")
    wait_until(live.pipeline.started.is_set)
    with (
        live.client() as client,
        client.stream("POST", "/v1/images/generations", json=BODY) as answer,
    ):
        wait_until(lambda: live.depth == 1)
        live.engine.drain()
        (event,) = events_of("".join(answer.iter_text()))
    assert (event.name, event.data["error"]["code"]) == ("error", "shutting_down")
    live.pipeline.gate.set()
    assert running.answer().status_code == 200


def test_a_full_queue_is_told_by_its_status(start_live: StartLive) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    live = start_live(pipeline, settings={"queue_limit": 1})
    later = [live.generate_later("running")]
    wait_until(pipeline.started.is_set)
    later.append(live.generate_later("waiting"))
    wait_until(lambda: live.depth == 1)
    with live.client() as client:
        refused = client.post("/v1/images/generations", json=BODY)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    pipeline.gate.set()
    assert [one.answer().status_code for one in later] == [200, 200]


def test_a_waiting_stream_shows_that_it_lives(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.05)
    with (
        live.client() as client,
        client.stream("POST", "/v1/images/generations", json=BODY) as answer,
    ):
        chunks = answer.iter_text()
        assert [next(chunks) for _ in range(2)] == [": alive\n\n"] * 2
        live.pipeline.gate.set()
        assert "image_generation.completed" in "".join(chunks)


def test_a_client_that_leaves_a_stream_cancels_its_job(live: Live, sdk: OpenAI) -> None:
    running = sdk.images.generate(prompt="running", stream=True)
    wait_until(live.pipeline.started.is_set)
    waiting = sdk.images.generate(prompt="waiting", stream=True)
    wait_until(lambda: live.depth == 1)
    waiting.close()
    wait_until(lambda: live.depth == 0)
    running.close()
    # The service must have seen it before the next slice is allowed.
    wait_until(lambda: not live.server.server_state.tasks)
    live.pipeline.gate.set()
    wait_until(lambda: live.pipeline.abandoned == ["running"])
    assert live.pipeline.ran == ["running"]
    assert live.generate("next").status_code == 200


class NoisyPipeline(FakePipeline):
    """Draws what no encoder makes small, so that a system's buffers cannot hold an answer."""

    def run(
        self, params: GenerationParams, *, alone: bool = False
    ) -> Generator[FakeSlice, None, FakeResult]:
        result = yield from super().run(params)
        noise = Image.effect_noise((params.width or 64, params.height or 64), 90).convert("RGB")
        return dataclasses.replace(result, pictures=[as_drawn(noise)] * params.n)


def ask_by_socket(live: Live, client: socket.socket, **given: Any) -> None:
    body = json.dumps({**BODY, "size": "2048x2048", **given}).encode()
    client.connect(("127.0.0.1", live.port))
    client.sendall(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


def test_a_client_that_stops_reading_is_left(start_live: StartLive) -> None:
    live = start_live(NoisyPipeline(), settings={"client_timeout_s": 0.5})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ask_by_socket(live, client, n=2)
        assert client.recv(12) == b"HTTP/1.1 200"
        wait_until(lambda: live.pipeline.ended)
        wait_until(lambda: not live.server.server_state.connections)
        wait_until(lambda: not live.server.server_state.tasks)


def test_a_client_that_reads_slowly_is_served(start_live: StartLive) -> None:
    live = start_live(NoisyPipeline(), settings={"client_timeout_s": 1.0})
    received = bytearray()
    with socket.socket() as client:
        client.settimeout(PATIENCE_S)
        ask_by_socket(live, client, n=2, stream=False)
        while chunk := client.recv(128 * 1024):
            received += chunk
            time.sleep(0.05)
    answer = json.loads(bytes(received).partition(b"\r\n\r\n")[2])
    assert len(answer["data"]) == 2


def test_many_streams_at_once_all_end(start_live: StartLive) -> None:
    live = start_live()
    ends: list[str] = []

    def ask(number: int) -> None:
        with httpx2.Client(base_url=live.url, timeout=60) as client:
            text = client.post("/v1/images/generations", json={**BODY, "prompt": f"p{number}"}).text
            ends.append(events_of(text)[-1].name)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == ["image_generation.completed"] * 20
