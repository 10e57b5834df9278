"""Drawing with a service: its public API over a real socket."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from app.cli import cli
from app.cli.console import UsageError
from app.cli.drawing import DrawingError, Order
from app.cli.drawing.event_stream import read_events
from app.cli.drawing.remote import RemoteArtist
from app.keys import ApiKey, digest_of, new_key
from fluxcore.params import GenerationParams
from tests.service.conftest import Live, StartLive, wait_until
from tests.service.fake_pipeline import FakePipeline, failing_loader, slow_loader


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.shares: list[float] = []
        self.notes: list[str] = []
        self.previews: list[tuple[int, tuple[int, int]]] = []

    def show(
        self, stage: str, share: float | None = None, left_s: float | None = None, note: str = ""
    ) -> None:
        self.stages.append(stage)
        if stage == "drawing" and share is not None:
            self.shares.append(share)
        self.notes.append(note)

    def preview(self, image_index: int, data: bytes) -> None:
        self.previews.append((image_index, Image.open(io.BytesIO(data)).size))


def order(prompt: str, previews: int = 0, **given: object) -> Order:
    return Order(GenerationParams(prompt=prompt, **given), previews=previews)  # type: ignore[arg-type]


def generate(live: Live, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", "--server", live.url, *arguments], input=stdin)


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_service_draws_and_tells_how_it_stands(start_live: StartLive) -> None:
    live = start_live()
    artist, notes = RemoteArtist(live.url, None), Notes()
    drawn = artist.draw(order("two foxes", 10, n=2, seed=7, width=64, height=96), notes)
    assert [(p.seed, p.width, p.height, p.format) for p in drawn.pictures] == [
        (7, 64, 96, "png"),
        (8, 64, 96, "png"),
    ]
    # Of steps that follow each other at once, the service may leave one out.
    assert notes.shares == sorted(notes.shares) and notes.shares[-1] == 1.0
    assert notes.notes[-1] == "picture 2 of 2, step 4 of 4"
    assert set(notes.previews) == {(0, (64, 96)), (1, (64, 96))}
    assert drawn.timings_ms["total"] > 0
    assert artist.name == f"fake-model at {live.url}"


def test_generate_writes_what_a_service_draws(start_live: StartLive, tmp_path: Path) -> None:
    live = start_live()
    result = generate(live, "-", "-o", "fox.webp", "--seed", "7", stdin="a fox\n")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("fox.webp  64x64  seed 7\n")
    assert live.pipeline.ran == ["a fox"]
    with Image.open("fox.webp") as picture:
        assert picture.format == "WEBP"
    piped = generate(live, "a fox", "-o", "-")
    with Image.open(io.BytesIO(piped.stdout_bytes)) as picture:
        assert picture.format == "PNG"


def test_references_mask_and_parameters_arrive(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start_live()
    asked: list[GenerationParams] = []
    run = live.pipeline.run

    def noting(params: GenerationParams, *, alone: bool) -> object:
        asked.append(params)
        return run(params, alone=alone)

    monkeypatch.setattr(live.pipeline, "run", noting)
    Image.effect_noise((96, 80), 60).convert("RGB").save("noise.png")
    mask = Image.new("L", (96, 80))
    mask.paste(255, (0, 0, 40, 40))
    mask.save("mask.png")
    given = ("--image", "noise.png", "--mask", "mask.png", "--strength", "0.5", "--steps", "8")
    more = ("--schedule", "power", "--power-alpha", "3", "--guidance", "2", "--negative", "dull")
    result = generate(live, "a fox", *given, *more)
    assert result.exit_code == 0, result.stderr
    (params,) = asked
    with Image.open("noise.png") as sent:
        assert params.references[0].tobytes() == sent.tobytes()
    assert params.mask is not None and params.mask.tobytes() == mask.tobytes()
    assert (params.strength, params.steps, params.guidance) == (0.5, 8, 2.0)
    assert (params.schedule, params.power_alpha) == ("power", 3.0)
    assert params.negative_prompt == "dull"


def test_whoever_leaves_cancels_the_job_there(start_live: StartLive) -> None:
    live = start_live()

    class Leaving(Notes):
        def show(self, stage: str, *rest: object, **named: object) -> None:
            if stage == "drawing":
                live.pipeline.close_gate()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RemoteArtist(live.url, None).draw(order("left alone", steps=50), Leaving())
    live.pipeline.gate.set()
    wait_until(lambda: live.pipeline.abandoned == ["left alone"])


def test_a_service_that_loads_is_waited_for(start_live: StartLive) -> None:
    gate = threading.Event()
    pipeline = FakePipeline()
    live = start_live(pipeline, load=slow_loader(pipeline, gate), until_ready=False)
    artist = RemoteArtist(live.url, None)
    wait_until(lambda: artist.standing == "the service is loading transformer, 50%")

    class Opening(Notes):
        def show(self, stage: str, *rest: object, **named: object) -> None:
            super().show(stage)
            gate.set()

    notes = Opening()
    assert artist.draw(order("a fox"), notes).pictures
    assert notes.stages[0] == "the service is loading transformer"


@pytest.mark.parametrize(
    ("prompt", "status", "says"),
    [
        ("unfit", 2, "do not fit this model"),
        ("oom", 1, "ask for a smaller size"),
        ("fail", 1, "the job failed for a reason that is in the service's log"),
    ],
)
def test_a_job_that_fails_is_told_in_the_services_words(
    start_live: StartLive, prompt: str, status: int, says: str
) -> None:
    result = generate(start_live(), prompt)
    assert result.exit_code == status
    # The service's own log is on the same standard error here.
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fluxd: ") and says in last
    assert not list(Path().iterdir())


def test_a_key_is_sent(start_live: StartLive, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key()
    live = start_live(settings={"api_keys": (ApiKey("alice", digest_of(key)).entry,)})
    refused = generate(live, "a fox")
    assert refused.exit_code == 1 and "--key or FLUXD_KEY" in refused.stderr
    assert generate(live, "a fox", "--key", "wrong").exit_code == 1
    assert generate(live, "a fox", "--key", key).exit_code == 0
    monkeypatch.setenv("FLUXD_KEY", key)
    monkeypatch.setenv("FLUXD_SERVER", live.url)
    assert CliRunner().invoke(cli, ["generate", "a fox"]).exit_code == 0
    with pytest.raises(UsageError, match="characters that no key has"):
        RemoteArtist(live.url, "a\nkey")


def test_where_nothing_answers_is_told(start_live: StartLive) -> None:
    live = start_live(load=failing_loader, until_ready=False)
    port = live.port
    wait_until(lambda: not live.thread.is_alive() or live.engine.has_failed)
    with pytest.raises(DrawingError):
        RemoteArtist(live.url, None).make_ready(Notes())
    live.server.should_exit = True
    live.thread.join()
    result = CliRunner().invoke(cli, ["generate", "a fox", "--server", f"127.0.0.1:{port}"])
    assert result.exit_code == 1
    assert result.stderr == (
        f"fluxd: cannot reach http://127.0.0.1:{port}: Connection refused; "
        "is 'fluxd serve' running?\n"
    )


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://user@host",
        "http://:80",
        "http://[::1",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--server takes an address"):
        RemoteArtist(url, None)


def test_the_base_url_of_other_clients_works(start_live: StartLive) -> None:
    live = start_live()
    assert RemoteArtist(f"{live.url}/v1/", None).url == live.url


@dataclass
class Stranger:
    """A program that says it is a service and answers every job with the same bytes."""

    port: int
    status: int = 200
    answer: bytes = b""


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._send(
                200, json.dumps({"state": "ready", "model": "\x1b]0;new title\x07"}).encode()
            )

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._send(made.status, made.answer)

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Stranger(server.server_port)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def event(name: str, data: str | dict[str, object]) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"event: {name}\ndata: {text}\n\n".encode()


def completed(file: bytes, **changed: object) -> bytes:
    image = {"b64": base64.b64encode(file).decode(), "format": "png", "seed": 1, **changed}
    return event("completed", {"images": [image], "timings": {"total_ms": 1}, "warnings": []})


def test_no_text_of_a_service_steers_the_terminal(stranger: Stranger) -> None:
    artist = RemoteArtist(f"127.0.0.1:{stranger.port}", None)
    assert artist.name.isprintable() and "new title" in artist.name
    message = "no\x1b]52;c;cm0=\x07\u202e\x9b2J"
    stranger.status, stranger.answer = 400, json.dumps({"error": {"message": message}}).encode()
    with pytest.raises(DrawingError, match=r"no ]52;c;cm0=   2J"):
        artist.draw(order("a fox"), Notes())
    stranger.status, stranger.answer = 200, event("error", {"error": {"message": message}})
    with pytest.raises(DrawingError, match=r"no ]52;c;cm0=   2J"):
        artist.draw(order("a fox"), Notes())


@pytest.mark.parametrize(
    "answer",
    [
        event("step", "{oops"),
        event("step", {}),
        event("step", '{"percent": 1e999, "eta_s": 1, "image_index": 0, "step": 1, "steps": 4}'),
        event("completed", "[]"),
        event("completed", "[" * 9999),
        completed(b"", b64="!"),
        completed(b"", seed="/../../x"),
        completed(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
        event("preview", {"image_index": 0, "b64": base64.b64encode(b"BM").decode()}),
    ],
)
def test_an_answer_that_is_none_is_told_plainly(stranger: Stranger, answer: bytes) -> None:
    artist = RemoteArtist(f"127.0.0.1:{stranger.port}", None)
    stranger.answer = answer
    with pytest.raises(DrawingError, match=r"makes no sense|is not a PNG|is empty"):
        artist.draw(order("a fox"), Notes())


def test_events_are_read() -> None:
    lines = b": alive\n\nevent: step\ndata: {\ndata: }\n\ndata:x\r\n\r\nevent: cut\ndata: y\n"
    events = list(read_events(io.BytesIO(lines)))
    assert events == [("step", "{\n}"), ("message", "x")]
