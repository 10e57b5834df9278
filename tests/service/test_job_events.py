"""``/v1/jobs``: what those who watch a job are told."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import httpx2

from tests.service.conftest import Later, StartLive, wait_until
from tests.service.kept_jobs import accept, events_in, look, wait_for


def test_previews_are_among_a_jobs_events(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    told: list[str] = []
    with live.client() as client:
        job = accept(client, "seen coming", previews=2, steps=6)
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
            for line in events.iter_lines():
                live.pipeline.gate.set()
                told.append(line)
    names = [line.removeprefix("event: ") for line in told if line.startswith("event: ")]
    assert names.count("preview") == 2 and names[-1] == "completed"
    shown = json.loads(told[told.index("event: preview") + 1].removeprefix("data: "))
    assert (shown["step"], shown["format"], shown["image_index"]) == (2, "png", 0)
    assert base64.b64decode(shown["b64"]).startswith(b"\x89PNG")


def test_events_tell_the_whole_story_once(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    with live.client() as client:
        job = accept(client, n=2, steps=2)
        stream = Later(lambda: client.get(job["urls"]["events"]))
        wait_until(lambda: live.engine.status().running)
        live.pipeline.gate.set()
        heard = events_in(stream.answer().text)
        assert stream.answer().headers["content-type"].startswith("text/event-stream")
        names = [name for _, name, _ in heard if name != "queued"]
        assert names[0] == "started" and names[-1] == "completed"
        # A reader that falls behind misses steps that are over.
        percents = [told["percent"] for _, name, told in heard if name == "step"]
        assert percents and {*percents} <= {25.0, 50.0, 75.0, 100.0}
        assert percents == sorted(percents) and percents[-1] == 100.0
        last_id, last, told = heard[-1]
        assert (last_id, last) == ("end", "completed")
        assert told == {"type": "completed", **look(client, job)}
        assert len({event_id for event_id, _, _ in heard}) == len(heard)


def read_until(lines: Iterator[str], wanted: str) -> None:
    for line in lines:
        if line == f"event: {wanted}":
            return
    raise AssertionError(f"no {wanted} came")


def test_a_client_that_reconnects_gets_the_state_then_what_follows(
    start_live: StartLive, data: str
) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    with live.client() as client:
        first, second = accept(client, "first"), accept(client, "second")
        with client.stream("GET", second["urls"]["events"]) as stream:
            read_until(stream.iter_lines(), "queued")
        # Leaving the events does not cancel a job.
        assert look(client, second)["status"] == "queued"
        assert look(client, second)["position"] >= 1
        with client.stream("GET", first["urls"]["events"]) as stream:
            read_until(stream.iter_lines(), "started")
        live.pipeline.gate.set()
        wait_for(client, second)
        for _ in range(2):
            heard = events_in(client.get(second["urls"]["events"]).text)
            assert [name for _, name, _ in heard] == ["completed"]
        # A browser that has heard the end would ask again for ever.
        ended = client.get(second["urls"]["events"], headers={"Last-Event-ID": heard[-1][0]})
        assert ended.status_code == 204


def test_many_watch_one_job(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    with live.client() as client:
        job = accept(client)

        def watch() -> httpx2.Response:
            with live.client() as own:
                return own.get(job["urls"]["events"])

        streams = [Later(watch) for _ in range(10)]
        wait_until(lambda: live.engine.status().running)
        live.pipeline.gate.set()
        for stream in streams:
            assert events_in(stream.answer().text)[-1][1] == "completed"
