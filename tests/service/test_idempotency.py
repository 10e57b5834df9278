"""Idempotency-Key on routes that draw while the client waits: one request, one drawing."""

from __future__ import annotations

import base64
import logging
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.jobs.answers import RECORD_BYTES, KeptAnswer, KeptAnswers, RequestKey
from app.jobs.files import JobFiles
from app.jobs.opening import open_kept
from app.jobs.retention import Retention
from app.jobs.schema import open_database
from app.main import create_app, create_engine
from tests.service.conftest import (
    Later,
    Live,
    Start,
    StartLive,
    encode,
    error_of,
    settings_for_tests,
    wait_until,
)
from tests.service.fake_pipeline import FakePipeline, loader_of

REPLAYED = "idempotency-replayed"


def post(
    client: TestClient | httpx2.Client, key: str, prompt: str = "a fox", **given: Any
) -> httpx2.Response:
    headers = {"Idempotency-Key": key, **given.pop("headers", {})}
    return client.post("/v1/generate", json={"prompt": prompt, **given}, headers=headers)


def ask(live: Live, content: bytes = b'{"prompt": "a fox"}') -> httpx2.Response:
    """The same request over a connection of its own, byte for byte."""
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json", "Accept": "*/*"}
    with live.client() as client:
        return client.post("/v1/generate", content=content, headers=headers)


def test_a_repeated_request_gets_the_first_answer(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    client = start(pipeline, data_dir=data)
    first = post(client, "k", seed=7)
    again = post(client, "k", seed=7)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert again.headers[REPLAYED] == "true" and REPLAYED not in first.headers
    assert again.headers["content-type"] == first.headers["content-type"]
    # The answer is the first one's; the request is another one.
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert pipeline.ran == ["a fox"]
    assert post(client, "another", seed=7).json()["images"] == first.json()["images"]
    assert pipeline.ran == ["a fox"] * 2


def test_a_client_that_leaves_while_sending_leaves_no_trace_in_the_log(
    start_live: StartLive, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    live = start_live(settings={"data_dir": data})
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.sendall(
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Idempotency-Key: k\r\nContent-Length: 1000\r\n\r\n{"
    )
    connection.close()
    # The key stands for nothing yet.
    assert ask(live).status_code == 200
    assert live.pipeline.ran == ["a fox"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_bytes_of_a_picture_are_repeated_with_their_headers(start: Start, data: str) -> None:
    client = start(data_dir=data)
    png = {"headers": {"Accept": "image/png"}}
    first, again = post(client, "k", **png), post(client, "k", **png)
    assert again.content == first.content and again.content.startswith(b"\x89PNG")
    assert again.headers["x-fluxd-seed"] == first.headers["x-fluxd-seed"]
    assert again.headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "a crow"}, {"seed": 8}, {"headers": {"Accept": "image/png"}}],
    ids=["prompt", "seed", "accept"],
)
def test_the_same_key_with_another_request_is_refused(
    start: Start, data: str, changed: dict[str, Any]
) -> None:
    pipeline = FakePipeline()
    client = start(pipeline, data_dir=data)
    post(client, "k", seed=7)
    refused = post(client, "k", **{"prompt": "a fox", "seed": 7, **changed})
    assert refused.status_code == 422
    assert error_of(refused)["code"] == "idempotency_key_reused"
    assert pipeline.ran == ["a fox"]


def test_the_same_form_is_the_same_request_whatever_its_boundary(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    client = start(pipeline, data_dir=data)
    picture = base64.b64decode(encode(Image.new("RGB", (64, 64), "red")))

    def ask(prompt: str) -> httpx2.Response:
        return client.post(
            "/v1/images/edits",
            data={"prompt": prompt},
            files={"image": ("a.png", picture)},
            headers={"Idempotency-Key": "k"},
        )

    first, again, other = ask("a fox"), ask("a fox"), ask("a crow")
    assert first.request.headers["content-type"] != again.request.headers["content-type"]
    assert first.status_code == 200 and again.content == first.content
    assert again.headers[REPLAYED] == "true"
    assert other.status_code == 422
    assert pipeline.ran == ["a fox"]


def test_a_stream_is_repeated_from_its_start(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    client = start(pipeline, data_dir=data)
    given = {"prompt": "a fox", "stream": True, "partial_images": 1}
    asks = [
        client.post("/v1/images/generations", json=given, headers={"Idempotency-Key": "k"})
        for _ in range(2)
    ]
    assert asks[0].headers["content-type"].startswith("text/event-stream")
    assert "image_generation.completed" in asks[0].text
    assert asks[1].text == asks[0].text
    assert pipeline.ran == ["a fox"]


def test_a_stream_that_ends_in_an_error_is_not_kept(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    client = start(pipeline, data_dir=data)
    given = {"prompt": "fail", "stream": True}
    for _ in range(2):
        answer = client.post("/v1/images/generations", json=given, headers={"Idempotency-Key": "k"})
        assert REPLAYED not in answer.headers
    assert pipeline.ran == ["fail"] * 2


def test_keys_survive_a_restart(start: Start, data: str) -> None:
    settings = settings_for_tests(data_dir=data)
    answers, pipelines = [], []
    for _ in range(2):
        pipeline = FakePipeline()
        engine = create_engine(settings, loader_of(pipeline))
        kept = open_kept(settings, engine)
        with TestClient(create_app(settings, engine, kept)) as client:
            wait_until(lambda engine=engine: engine.status().is_ready)
            answers.append(post(client, "k"))
        pipelines.append(pipeline)
    assert answers[0].content == answers[1].content
    assert [pipeline.ran for pipeline in pipelines] == [["a fox"], []]


def test_an_answer_is_repeated_for_as_long_as_its_pictures_can_be_fetched(
    start: Start, data: str
) -> None:
    pipeline = FakePipeline()
    # Room for one picture: the next one takes its place.
    client = start(pipeline, data_dir=data, picture_link_bytes=1)

    def ask(key: str, prompt: str) -> httpx2.Response:
        body = {"prompt": prompt, "response_format": "url"}
        headers = {"Idempotency-Key": key}
        return client.post("/v1/images/generations", json=body, headers=headers)

    first, again = ask("k", "a fox"), ask("k", "a fox")
    assert again.content == first.content and again.headers[REPLAYED] == "true"
    assert ask("k", "a crow").status_code == 422
    assert pipeline.ran == ["a fox"]
    ask("other", "a crow")
    url = first.json()["data"][0]["url"]
    assert client.get(urlsplit(url).path).status_code == 404
    anew = ask("k", "a fox")
    assert REPLAYED not in anew.headers
    assert client.get(urlsplit(anew.json()["data"][0]["url"]).path).status_code == 200
    assert pipeline.ran == ["a fox", "a crow", "a fox"]
    assert ask("k", "a fox").content == anew.content


@pytest.mark.parametrize("prompt", ["oom", "fail", "unfit"])
def test_errors_are_not_kept(start: Start, data: str, prompt: str) -> None:
    client = start(data_dir=data)
    assert post(client, "k", prompt).status_code >= 400
    again = post(client, "k", prompt)
    assert again.status_code >= 400 and REPLAYED not in again.headers
    # Nothing was drawn for the key, so it may be given with what is right.
    assert post(client, "k", "a fox").status_code == 200


def test_repetitions_while_the_first_runs_wait_for_it(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    asks = [Later(lambda: ask(live)) for _ in range(5)]
    wait_until(live.pipeline.started.is_set)
    with live.client() as client:
        assert error_of(post(client, "k", "a crow"))["code"] == "idempotency_key_reused"
    live.pipeline.gate.set()
    answers = [ask.answer() for ask in asks]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum(REPLAYED in answer.headers for answer in answers) == 4
    assert live.pipeline.ran == ["a fox"]


def test_a_client_that_lost_its_connection_asks_again(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    body = b'{"prompt": "a fox"}'
    head = (
        "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: k\r\n"
        f"Accept: */*\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", live.port)) as lost:
        lost.sendall(head.encode() + body)
        wait_until(live.pipeline.started.is_set)
    # A request without a key is cancelled when its client leaves; this one goes on.
    again = Later(lambda: ask(live, content=body))
    # Long enough for the loss to be noticed.
    time.sleep(0.2)
    live.pipeline.gate.set()
    assert again.answer().status_code == 200
    assert live.pipeline.ran == live.pipeline.ended == ["a fox"]


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9"])
def test_a_key_that_is_none_is_refused(start: Start, data: str, key: str) -> None:
    client = start(data_dir=data)
    refused = client.post(
        "/v1/generate",
        json={"prompt": "a fox"},
        headers=[(b"Idempotency-Key", key.encode("latin-1"))],
    )
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "Idempotency-Key"


def test_a_key_that_cannot_be_honoured_is_refused(start: Start) -> None:
    pipeline = FakePipeline()
    client = start(pipeline)
    refused = post(client, "k")
    assert refused.status_code == 400
    assert error_of(refused)["code"] == "idempotency_off"
    assert pipeline.ran == []


def test_an_answer_that_cannot_be_kept_is_given_all_the_same(
    start: Start, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JobFiles, "write_answer", full)
    client = start(data_dir=data)
    assert post(client, "k").status_code == 200
    again = post(client, "k")
    assert again.status_code == 200 and REPLAYED not in again.headers


def test_answers_are_removed_by_age_and_by_size(tmp_path: Path) -> None:
    files, database = JobFiles(tmp_path), open_database(tmp_path)
    answer = KeptAnswer(200, (("content-type", "text/plain"),), b"x" * 100)
    kept = KeptAnswers(database, files, Retention(1000.0, 2 * (100 + RECORD_BYTES)))
    for name in ("a", "b", "c", "d"):
        kept.keep(RequestKey("me", name, "f"), answer)
    kept.start()
    found = {name: kept.find(RequestKey("me", name, "f")) for name in ("a", "b", "c", "d")}
    assert found == {"a": None, "b": None, "c": answer, "d": answer}
    assert len(list((tmp_path / "answers").iterdir())) == 2
    assert kept.find(RequestKey("other", "d", "f")) is None
    old = KeptAnswers(database, files, Retention(1e-9, 10**6))
    assert old.find(RequestKey("me", "d", "f")) is None
    # A key whose answer is too old may stand for another request.
    old.keep(RequestKey("me", "d", "g"), answer)
    old.start()
    assert list((tmp_path / "answers").iterdir()) == []
    database.close()
    files.close()
