"""Webhooks: who is told, what, how often, and that nobody else can have said it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.jobs import webhooks as module
from app.jobs.opening import open_kept
from app.jobs.schema import open_database
from app.main import create_engine
from app.settings import SettingsError
from tests.service.conftest import Start, error_of, settings_for_tests, wait_until
from tests.service.fake_pipeline import FakePipeline, loader_of

LOOPBACK = "127.0.0.1"
SECRET = bytes(range(32))


@dataclass
class Heard:
    """One request to the receiver."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def news(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class Receiver:
    """A program that is told. ``statuses`` are its answers, the last one for ever."""

    server: ThreadingHTTPServer
    statuses: list[int] = field(default_factory=lambda: [204])
    heard: list[Heard] = field(default_factory=list)

    def url(self, path: str = "/done") -> str:
        return f"http://{LOOPBACK}:{self.server.server_address[1]}{path}"

    def wait_for(self, count: int) -> list[Heard]:
        wait_until(lambda: len(self.heard) >= count)
        return self.heard


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            lowered = {name.lower(): value for name, value in self.headers.items()}
            made.heard.append(Heard(self.path, lowered, body))
            status = made.statuses.pop(0) if len(made.statuses) > 1 else made.statuses[0]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", made.url("/elsewhere"))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    made = Receiver(ThreadingHTTPServer((LOOPBACK, 0), Handler))
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    secret = tmp_path / "secret"
    secret.write_text(f"whsec_{base64.b64encode(SECRET).decode()}\n")
    return {
        "data_dir": str(tmp_path / "data"),
        "webhook_hosts": (LOOPBACK,),
        "webhook_networks": ("127.0.0.0/8",),
        "webhook_secret_file": secret,
    }


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_AFTER_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(module, "LONGEST_SLEEP_S", 0.02)


def accept(client: Any, webhook: str, prompt: str = "a fox") -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={"prompt": prompt, "webhook": webhook})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def check_signature(heard: Heard) -> None:
    """As a receiver does it, from the specification and not from our code."""
    sent = heard.headers
    signed = f"{sent['webhook-id']}.{sent['webhook-timestamp']}.".encode() + heard.body
    expected = base64.b64encode(hmac.new(SECRET, signed, hashlib.sha256).digest()).decode()
    assert sent["webhook-signature"] == f"v1,{expected}"
    assert abs(int(sent["webhook-timestamp"]) - time.time()) < 60


def left_to_tell(data_dir: str) -> int:
    database = open_database(Path(data_dir))
    try:
        (count,) = database.read(
            lambda c: c.execute("SELECT COUNT(*) FROM deliveries").fetchone()
        ).result()
        return int(count)
    finally:
        database.close()


@pytest.mark.parametrize(("prompt", "status"), [("a fox", "completed"), ("oom", "failed")])
def test_the_end_is_told_once_and_signed(
    start: Start, receiver: Receiver, settings: dict[str, Any], prompt: str, status: str
) -> None:
    client = start(**settings)
    job = accept(client, receiver.url("/done?token=1"), prompt)
    (heard,) = receiver.wait_for(1)
    check_signature(heard)
    assert heard.path == "/done?token=1"
    assert heard.headers["content-type"] == "application/json"
    news = heard.news
    assert news["type"] == f"job.{status}"
    assert news["data"]["id"] == job["id"] and news["data"]["status"] == status
    for image in news["data"]["images"]:
        assert client.get(image["path"]).content.startswith(b"\x89PNG")
    assert (news["data"]["error"] is None) is (status == "completed")
    # What is told is that the job has ended, so it has.
    assert client.get(news["data"]["path"]).json()["status"] == status
    wait_until(lambda: left_to_tell(settings["data_dir"]) == 0)
    assert len(receiver.heard) == 1


def test_a_cancelled_job_is_told_of(
    start: Start, receiver: Receiver, settings: dict[str, Any]
) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    client = start(pipeline, **settings)
    job = accept(client, receiver.url())
    client.delete(job["urls"]["job"])
    (heard,) = receiver.wait_for(1)
    assert heard.news["type"] == "job.cancelled"
    pipeline.gate.set()


@pytest.mark.usefixtures("impatient")
def test_what_was_not_taken_is_told_again_under_the_same_id(
    start: Start, receiver: Receiver, settings: dict[str, Any]
) -> None:
    receiver.statuses[:] = [500, 302, 200]
    client = start(**settings)
    accept(client, receiver.url())
    heard = receiver.wait_for(3)
    wait_until(lambda: left_to_tell(settings["data_dir"]) == 0)
    assert len(heard) == 3
    # A redirect is no place to go to.
    assert {one.path for one in heard} == {"/done"}
    assert len({one.headers["webhook-id"] for one in heard}) == 1
    assert len({one.body for one in heard}) == 1
    for one in heard:
        check_signature(one)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("status", "times"), [(503, 4), (410, 1)])
def test_it_is_given_up_in_the_end(
    start: Start,
    receiver: Receiver,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    status: int,
    times: int,
) -> None:
    receiver.statuses[:] = [status]
    client = start(**settings)
    job = accept(client, receiver.url("/done?token=secret"))
    wait_until(lambda: "is given up" in caplog.text)
    assert len(receiver.heard) == times
    assert left_to_tell(settings["data_dir"]) == 0
    assert job["id"] in caplog.text and "token" not in caplog.text


def test_what_was_not_told_is_told_after_a_restart(
    start: Start, receiver: Receiver, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = create_engine(settings_for_tests(**settings), loader_of(FakePipeline()))
    kept = open_kept(settings_for_tests(**settings), engine)
    assert kept is not None
    kept.close()
    # A job of an earlier process, which ended between the job's end and the telling.
    database = open_database(Path(settings["data_dir"]))
    database.write(
        lambda c: c.execute(
            "INSERT INTO deliveries (id, job_id, url, body, next_s) VALUES (?, ?, ?, ?, 0)",
            ("msg_1", "job_1", receiver.url(), '{"type": "job.completed"}'),
        )
    ).result()
    database.close()
    start(**settings)
    (heard,) = receiver.wait_for(1)
    check_signature(heard)
    assert heard.headers["webhook-id"] == "msg_1"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/done",
        "http://127.0.0.1.example.org/",
        "file:///etc/passwd",
        "http://user:word@127.0.0.1/",
        "http://127.0.0.1:22/",
        "nothing",
        "",
        "http://127.0.0.1/".ljust(3000, "x"),
    ],
)
def test_other_addresses_are_refused_at_once(
    start: Start, settings: dict[str, Any], url: str
) -> None:
    client = start(**settings)
    refused = client.post("/v1/jobs", json={"prompt": "a fox", "webhook": url})
    error = error_of(refused)
    assert refused.status_code == 400 and error["param"] == "webhook"
    assert error["message"].startswith("webhook ")
    assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.usefixtures("impatient")
def test_an_allowed_name_with_a_private_address_is_not_asked(
    start: Start,
    receiver: Receiver,
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = start(**{**settings, "webhook_networks": ()})
    accept(client, receiver.url())
    wait_until(lambda: "is given up" in caplog.text)
    assert "private or reserved address" in caplog.text
    assert receiver.heard == []


def test_nobody_is_told_unless_the_settings_name_hosts(start: Start, tmp_path: Path) -> None:
    client = start(data_dir=str(tmp_path / "data"))
    refused = client.post("/v1/jobs", json={"prompt": "a fox", "webhook": "https://a.org/"})
    assert refused.status_code == 400
    assert "webhook_hosts is empty" in error_of(refused)["message"]
    # The other routes have no end to tell of.
    unknown = client.post("/v1/generate", json={"prompt": "a fox", "webhook": "https://a.org/"})
    assert error_of(unknown)["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    "text", [None, "", "whsec_", "whsec_c2hvcnQ=", "c2hvcnQ=" * 8, "whsec_!", "whsec_\u00e9"]
)
def test_a_secret_that_is_none_is_said_at_the_start(
    settings: dict[str, Any], tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "other"
    if text is not None:
        path.write_text(text)
    for named in (path, None):
        made = settings_for_tests(**{**settings, "webhook_secret_file": named})
        engine = create_engine(made, loader_of(FakePipeline()))
        for _ in range(2):
            with pytest.raises(SettingsError, match=r"webhook_.*openssl rand"):
                open_kept(made, engine)
