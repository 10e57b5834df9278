"""The service as its tests start it: in this process, or listening on a real socket."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.engine import Engine, Loader, Pipeline
from app.jobs.opening import open_kept
from app.main import Server, create_app, create_engine, create_server, listen
from app.settings import Settings
from tests.service.fake_pipeline import FakePipeline, loader_of

# How long a test waits for what happens at once on an idle machine.
PATIENCE_S = 60.0
# No warm-up, no waiting at the end, nothing on the disk, and the name by which the test
# client calls.
FOR_TESTS = {
    "warm_up_sizes": (),
    "shutdown_grace_s": 0.0,
    "data_dir": "off",
    "allowed_hosts": ("testserver",),
}


def wait_until(condition: Callable[[], object]) -> None:
    """Return once the condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def settings_for_tests(**given: Any) -> Settings:
    """The settings of tests, and the ones given."""
    return Settings(**{**FOR_TESTS, **given})


def encode(picture: Image.Image, picture_format: str = "PNG", **options: Any) -> str:
    """A picture as the base64 of a file."""
    target = io.BytesIO()
    picture.save(target, picture_format, **options)
    return base64.b64encode(target.getvalue()).decode()


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error of an answer, after checking the shape that all errors have."""
    body = answer.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    assert answer.headers["x-request-id"]
    found: dict[str, Any] = body["error"]
    return found


@dataclass
class Live:
    """A service that listens on a socket, on a thread of its own."""

    server: Server
    engine: Engine
    pipeline: FakePipeline
    port: int
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=PATIENCE_S)

    def generate(self, prompt: str, **given: Any) -> httpx2.Response:
        """One request over a connection of its own."""
        with self.client() as client:
            return client.post("/v1/generate", json={"prompt": prompt, **given})

    def generate_later(self, prompt: str, **given: Any) -> Later:
        """The same on another thread; returns at once."""
        return Later(lambda: self.generate(prompt, **given))

    @property
    def depth(self) -> int:
        return self.engine.status().queue_depth


class Later:
    """An answer that is being waited for."""

    def __init__(self, ask: Callable[[], httpx2.Response]) -> None:
        self._ask = ask
        self._answer: httpx2.Response | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._answer = self._ask()

    def answer(self) -> httpx2.Response:
        self._thread.join(PATIENCE_S)
        assert self._answer is not None, "no answer came"
        return self._answer


Start = Callable[..., TestClient]
StartLive = Callable[..., Live]


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Put the root logger back as the test runner had it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Where jobs are kept."""
    return str(tmp_path / "data")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a service in this process, around a given pipeline or a fake one."""
    with ExitStack() as stack:

        def begin(pipeline: Pipeline | None = None, **given: Any) -> TestClient:
            ready = FakePipeline() if pipeline is None else pipeline
            settings = settings_for_tests(**given)
            engine = create_engine(settings, lambda progress: ready)
            app = create_app(settings, engine, open_kept(settings, engine))
            client = stack.enter_context(TestClient(app))
            wait_until(lambda: engine.status().is_ready)
            return client

        yield begin


@pytest.fixture
def start_live() -> Iterator[StartLive]:
    """Start a service on a socket, around a fake pipeline."""
    with ExitStack() as stack:

        def begin(
            pipeline: FakePipeline | None = None,
            load: Loader | None = None,
            settings: Mapping[str, Any] | None = None,
            *,
            until_ready: bool = True,
        ) -> Live:
            fake = pipeline or FakePipeline()
            made = settings_for_tests(**(settings or {}))
            engine = create_engine(made, load or loader_of(fake))
            listener = listen("127.0.0.1", 0)
            port = listener.getsockname()[1]
            server = create_server(made, engine)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            live = Live(server, engine, fake, port, thread)
            thread.start()
            stack.callback(_end, live)
            wait_until(lambda: server.started)
            if until_ready:
                wait_until(lambda: engine.status().is_ready)
            return live

        yield begin


def _end(live: Live) -> None:
    live.pipeline.gate.set()
    live.server.should_exit = True
    live.thread.join(PATIENCE_S)
    assert not live.thread.is_alive()
