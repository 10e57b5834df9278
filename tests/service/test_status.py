"""/health, /ready and /, from start to end of a service."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import Query
from starlette.testclient import TestClient

from app.engine import Engine
from app.main import create_app, create_engine, serve
from app.settings import Settings
from fluxcore.version import __version__
from tests.service.conftest import Start, StartLive, error_of, settings_for_tests, wait_until
from tests.service.fake_pipeline import FakePipeline, failing_loader, loader_of, slow_loader

KEY_ENTRY = f"alice:{'0' * 64}"


def test_ready_says_how_far_loading_has_come_and_then_yes(start_live: StartLive) -> None:
    gate, pipeline = threading.Event(), FakePipeline()
    live = start_live(pipeline, slow_loader(pipeline, gate), until_ready=False)
    wait_until(lambda: live.engine.status().startup.stage == "transformer")
    with live.client() as client:
        not_yet = client.get("/ready")
        assert not_yet.status_code == 503
        assert error_of(not_yet)["code"] == "loading"
        assert int(not_yet.headers["retry-after"]) >= 1
        body = not_yet.json()
        assert (body["status"], body["stage"], body["progress"]) == ("loading", "transformer", 0.5)

        health = client.get("/health")
        assert health.status_code == 200
        assert (health.json()["model"], health.json()["bundled"]) == (None, None)

        # The second one's size depends on the model.
        for body in ({"prompt": "too early"}, {"prompt": "too early", "aspect_ratio": "2:1"}):
            refused = client.post("/v1/generate", json=body)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "loading")
            assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/v1/models").json()["data"][0]["id"] == "fluxd-demo", "what is loaded"

        gate.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.get("/ready").json()["status"] == "ready"
    assert live.generate("now").status_code == 200
    assert pipeline.ran == ["now"]


def test_ending_while_loading_stops_the_load(start_live: StartLive) -> None:
    pipeline = FakePipeline()
    live = start_live(pipeline, slow_loader(pipeline, threading.Event()), until_ready=False)
    live.server.should_exit = True
    live.thread.join(60.0)
    assert live.engine.status().state == "stopped"
    assert live.server.is_engine_stopped
    assert not live.engine.has_failed


def test_the_configured_sizes_are_drawn_before_ready(start: Start) -> None:
    pipeline = FakePipeline()
    start(pipeline, warm_up_sizes=("64x64", "128x64"))
    assert pipeline.warmed == [(64, 64), (128, 64)]

    pipeline = FakePipeline()
    start(pipeline, warm_up_sizes=Settings().warm_up_sizes)
    assert pipeline.warmed == [(64, 64)], "by default the size that the model draws by default"


def test_health_tells_what_runs_where(start: Start) -> None:
    health = start().get("/health").json()
    assert health["status"] == "ok"
    assert health["state"] == "ready"
    assert (health["model"], health["bundled"]) == ("fake-model", False)
    assert health["device"] == {"device": "fake"}
    assert health["version"] == __version__
    assert health["uptime_s"] >= 0
    assert (health["queue_depth"], health["running"]) == (0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_fails_when_the_worker_has_died(start: Start) -> None:
    class Deadly(FakePipeline):
        def run(self, params: object, *, alone: bool) -> object:
            raise SystemExit

    client = start(Deadly())
    answer = client.post("/v1/generate", json={"prompt": "x"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_dead")
    wait_until(lambda: client.get("/health").status_code == 503)
    assert client.get("/health").json()["state"] == "failed"
    ready = client.get("/ready")
    assert (ready.status_code, error_of(ready)["code"]) == (503, "engine_dead")
    later = client.post("/v1/generate", json={"prompt": "x"})
    assert (later.status_code, error_of(later)["code"]) == (503, "engine_dead")
    assert later.headers["x-should-retry"] == "false"


def test_health_notices_a_worker_that_does_not_come_back(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start_live()
    live.pipeline.close_gate()
    later = live.generate_later("stuck")
    live.pipeline.started.wait()
    with live.client() as client:
        # Within the bound, a long slice is nothing to worry about.
        assert client.get("/health").status_code == 200
        monkeypatch.setattr("app.engine.worker.UNMEASURED_STALL_S", 0.0)
        stalled = client.get("/health")
        assert stalled.status_code == 503
        assert stalled.json()["status"] == "failed"
        assert error_of(stalled)["code"] == "engine_dead"
        assert client.get("/ready").status_code == 503
        live.pipeline.gate.set()
        assert later.answer().status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        # Once slices have been measured, the bound follows from what they take.
        live.pipeline.close_gate()
        later = live.generate_later("stuck again")
        live.pipeline.started.wait()
        assert client.get("/health").status_code == 200
        monkeypatch.setattr("app.engine.worker.LEAST_STALL_S", 0.0)
        monkeypatch.setattr("app.engine.worker.STALL_FACTOR", 1e-9)
        assert client.get("/health").status_code == 503
        monkeypatch.setattr("app.engine.worker.STALL_FACTOR", 1e9)
        assert client.get("/health").status_code == 200
        live.pipeline.gate.set()
        assert later.answer().status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_service(caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for_tests(port=0)
    assert serve(settings, create_engine(settings, failing_loader)) == 1
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in errors] == [
        "loading failed: there is no directory missing-model; download it first"
    ]
    assert not errors[0].exc_info


def test_a_warm_up_that_fails_ends_the_service(caplog: pytest.LogCaptureFixture) -> None:
    class Cold(FakePipeline):
        def warm_up(self, sizes: object, progress: object = None) -> None:
            raise ValueError("no kernel")

    settings = settings_for_tests(port=0, warm_up_sizes=("64x64",))
    assert serve(settings, create_engine(settings, loader_of(Cold()))) == 1
    (error,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert error.getMessage() == "warming up failed"
    assert error.exc_info


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, None),
        ({"host": "localhost"}, None),
        ({"host": "0.0.0.0"}, "WITHOUT API KEYS: everyone who can reach"),
        ({"host": "0.0.0.0", "api_keys": (KEY_ENTRY,)}, "travel unencrypted"),
        ({"cors_origins": ("*",)}, "every web page that is open"),
        ({"cors_origins": ("*",), "api_keys": (KEY_ENTRY,)}, None),
        ({"allowed_hosts": ("*",)}, "DNS rebinding"),
    ],
)
def test_open_doors_are_warned_of(
    caplog: pytest.LogCaptureFixture, given: dict[str, Any], says: str | None
) -> None:
    settings = settings_for_tests(port=0, **{"allowed_hosts": (), **given})
    serve(settings, create_engine(settings, failing_loader))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (says is not None)
    assert says is None or says in warnings[0]


def test_the_index_lists_the_routes_that_there_are(start: Start) -> None:
    client = start()
    listed = set(client.get("/").json()["routes"])
    served = {
        f"{method.upper()} {path}"
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    assert listed == (served - {"GET /"}) | {"GET /openapi.json"}


def test_every_answer_has_a_request_id(start: Start) -> None:
    client = start()
    first, second = (client.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    for path in ("/health", "/nothing"):
        answer = client.get(path, headers={"x-request-id": "my-id.7"})
        assert answer.headers["x-request-id"] == "my-id.7"
    answer = client.post("/v1/generate", json={"prompt": "x"}, headers={"x-request-id": "my-id.8"})
    assert answer.json()["id"] == answer.headers["x-request-id"] == "my-id.8"


@pytest.mark.parametrize("sent", ["", "with space", "x" * 129, "-dash", "caf\xe9", "a;b"])
def test_a_strange_request_id_is_replaced(start: Start, sent: str) -> None:
    answer = start().get("/health", headers={"x-request-id": sent.encode("latin-1")})
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/health/", 404, "not_found"),
        ("GET", "/v1/generate", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_wrong_addresses_and_methods_have_the_one_shape(
    start: Start, method: str, path: str, status: int, code: str
) -> None:
    answer = start().request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    if status == 405:
        assert answer.headers["allow"] in error_of(answer)["message"]


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/fake-model", "/v1/jobs"],
)
def test_head_is_answered_as_get_without_the_body(
    start_live: StartLive, tmp_path: Path, path: str
) -> None:
    live = start_live(settings={"data_dir": str(tmp_path)})
    with live.client() as client:
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code == 200
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.content == b"" and get.content != b""
        # On the same connection: nothing of a body was left on it.
        assert client.head("/v1/jobs/job_0").status_code == 404


def test_a_bug_in_a_route_is_answered_without_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline = FakePipeline()
    settings = settings_for_tests()
    app = create_app(settings, Engine(loader_of(pipeline)))

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("in /secret/path")

    @app.get("/counted")
    async def counted(count: int = Query(ge=1)) -> None: ...

    with TestClient(app) as client:
        answer = client.get("/broken")
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
        assert any(record.exc_info for record in caplog.records)
        # What the framework itself validates has the same shape.
        answer = client.get("/counted?count=0")
        assert (answer.status_code, error_of(answer)["param"]) == (400, "count")
        answer = client.get("/counted")
        assert error_of(answer)["code"] == "missing_required_parameter"
