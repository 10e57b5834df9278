"""The native stream: where a job stands, what is coming, and how it ends."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app, create_engine
from fluxcore import FluxPipeline
from tests.service.conftest import (
    Live,
    StartLive,
    error_of,
    settings_for_tests,
    wait_until,
)
from tests.service.fake_pipeline import FakePipeline

BODY = {"prompt": "a red fox", "width": 64, "height": 96, "seed": 7, "stream": True}
Event = dict[str, Any]


@pytest.fixture(scope="module")
def client(tiny_pipeline: FluxPipeline) -> Iterator[TestClient]:
    settings = settings_for_tests()
    engine = create_engine(settings, lambda progress: tiny_pipeline)
    with TestClient(create_app(settings, engine)) as client:
        wait_until(lambda: engine.status().is_ready)
        yield client


def events(text: str) -> list[Event]:
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def stream(client: TestClient, **body: Any) -> list[Event]:
    answer = client.post("/v1/generate", json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def of(found: list[Event], kind: str) -> list[Event]:
    return [event for event in found if event["type"] == kind]


def test_every_step_is_told_and_then_the_whole_answer(client: TestClient) -> None:
    found = stream(client, steps=5)
    steps = of(found, "step")
    # A reader that is slower than the steps may miss some, never the last.
    assert steps and steps[-1]["step"] == steps[-1]["steps"] == 5
    assert [event["percent"] for event in steps] == [20.0 * event["step"] for event in steps]
    assert steps[-1]["eta_s"] is not None
    assert found[-1]["type"] == "completed"
    answer = client.post("/v1/generate", json={**BODY, "stream": False, "steps": 5}).json()
    last = {name: found[-1][name] for name in answer}
    for name in ("id", "created", "timings", "cache_hit"):
        del last[name], answer[name]
    assert last == answer


def test_previews_come_when_asked_for(client: TestClient) -> None:
    assert of(stream(client), "preview") == []
    found = stream(client, previews=2, steps=8, output_format="jpeg")
    previews = of(found, "preview")
    assert previews
    for event in previews:
        picture = Image.open(io.BytesIO(base64.b64decode(event["b64"])))
        assert (picture.format, picture.size) == ("JPEG", (64, 96))
        assert (event["width"], event["height"], event["format"]) == (64, 96, "jpeg")
        assert 0 < event["step"] < 8
    assert found[-1]["warnings"] == []


def test_percent_counts_all_pictures(client: TestClient) -> None:
    steps = of(stream(client, n=2, steps=2), "step")
    assert all(
        event["percent"] == 50 * event["image_index"] + 25 * event["step"] for event in steps
    )
    assert steps[-1]["percent"] == 100


def test_percent_of_a_part_of_the_schedule(client: TestClient) -> None:
    target = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(target, "PNG")
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, "PNG")
    body = {
        "prompt": "x",
        "stream": True,
        "images": [base64.b64encode(target.getvalue()).decode()],
        "mask": base64.b64encode(mask.getvalue()).decode(),
        "strength": 0.5,
        "steps": 8,
    }
    steps = of(events(client.post("/v1/generate", json=body).text), "step")
    assert 0 < steps[0]["percent"] <= steps[-1]["percent"] == 100


@pytest.fixture
def live(start_live: StartLive) -> Live:
    pipeline = FakePipeline()
    pipeline.close_gate()
    return start_live(pipeline)


def test_a_waiting_job_is_told_its_place(live: Live) -> None:
    running = live.generate_later("running")
    wait_until(live.pipeline.started.is_set)
    waiting = live.generate_later("waiting")
    wait_until(lambda: live.depth == 1)
    with (
        live.client() as client,
        client.stream("POST", "/v1/generate", json={**BODY, "prompt": "last"}) as answer,
    ):
        chunks = answer.iter_text()
        text = next(chunks)
        (place,) = events(text)
        assert (place["type"], place["position"] in (1, 2)) == ("queued", True)
        live.pipeline.gate.set()
        text += "".join(chunks)
    kinds = list(dict.fromkeys(event["type"] for event in events(text)))
    assert kinds == ["queued", "started", "step", "completed"]
    assert running.answer().status_code == waiting.answer().status_code == 200


def test_a_late_error_is_an_event(live: Live) -> None:
    live.pipeline.gate.set()
    error = events(live.generate("oom", stream=True).text)[-1]
    assert error["type"] == "error"
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["code"] == "out_of_memory"


def test_an_early_error_has_a_status(live: Live) -> None:
    answer = live.generate("x", stream=True, steps=0)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "steps")


@pytest.mark.parametrize("streams", [False, True])
def test_the_requests_own_time_limit_holds(live: Live, streams: bool) -> None:
    answer = live.generate("slow", stream=streams, timeout_s=0.2)
    if streams:
        assert events(answer.text)[-1]["error"]["code"] == "timeout"
    else:
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
    live.pipeline.gate.set()
    wait_until(lambda: live.pipeline.abandoned == ["slow"])


def test_an_interactive_job_goes_before_a_batch(live: Live) -> None:
    running = live.generate_later("running", priority="interactive")
    wait_until(live.pipeline.started.is_set)
    batch = live.generate_later("batch", priority="batch")
    wait_until(lambda: live.depth == 1)
    urgent = live.generate_later("urgent", priority="interactive")
    wait_until(lambda: live.depth == 2)
    live.pipeline.gate.set()
    for later in (running, batch, urgent):
        assert later.answer().status_code == 200
    assert live.pipeline.ran == ["running", "urgent", "batch"]


def test_a_client_that_leaves_cancels(live: Live) -> None:
    with (
        live.client() as client,
        client.stream("POST", "/v1/generate", json={**BODY, "prompt": "left"}) as answer,
    ):
        wait_until(live.pipeline.started.is_set)
        assert answer.status_code == 200
    wait_until(lambda: not live.server.server_state.tasks)
    live.pipeline.gate.set()
    wait_until(lambda: live.pipeline.abandoned == ["left"])
