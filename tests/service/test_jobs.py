"""``/v1/jobs`` over HTTP: accept, look, fetch, cancel, list, and what is refused."""

from __future__ import annotations

import base64
import logging
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from app.jobs.files import JobFiles
from app.keys import ApiKey, digest_of
from tests.service.conftest import Later, Start, StartLive, encode, error_of, wait_until
from tests.service.fake_pipeline import FakePipeline
from tests.service.kept_jobs import NO_JOB, accept, events_in, look, wait_for


def test_a_job_is_accepted_drawn_and_fetched(start: Start, data: str) -> None:
    client = start(data_dir=data)
    job = accept(client, seed=7, n=2, steps=3)
    assert job["object"] == "job" and job["status"] in ("queued", "running")
    assert job["images"] == [] and job["error"] is None and job["prompt"] == "a fox"
    done = wait_for(client, job)
    assert [image["seed"] for image in done["images"]] == [7, 8]
    assert done["params"]["steps"] == 3 and done["params"]["n"] == 2
    assert done["model"] == "fake-model" and done["timings"]["total_ms"] > 0
    assert done["created"] <= done["started"] <= done["finished"]
    assert done["position"] is None and done["progress"] is None
    assert done["urls"]["images"] == [image["url"] for image in done["images"]]
    for image in done["images"]:
        assert image["url"].endswith(".png")
        fetched = client.get(image["url"])
        assert fetched.headers["content-type"] == "image/png"
        assert fetched.headers["x-content-type-options"] == "nosniff"
        assert len(fetched.content) == image["bytes"]
        assert fetched.content.startswith(b"\x89PNG")
    # The number alone is enough.
    assert client.get(f"/v1/jobs/{job['id']}/images/1").content == fetched.content


def test_a_job_takes_what_generate_takes(start: Start, data: str) -> None:
    client = start(data_dir=data)
    picture = encode(Image.effect_noise((96, 64), 80.0).convert("RGB"))
    job = accept(
        client, width=None, height=None, images=[picture], output_format="webp", quality=60
    )
    done = wait_for(client, job)
    assert done["params"]["references"] == 1
    assert done["images"][0]["format"] == "webp"
    assert client.get(done["images"][0]["url"]).headers["content-type"] == "image/webp"
    warned = wait_for(client, accept(client, quality=60))
    assert any("quality has no effect on png" in warning for warning in warned["warnings"])


def test_a_job_comes_as_a_form_too(start: Start, data: str) -> None:
    client = start(data_dir=data)
    photo = ("photo.png", base64.b64decode(encode(Image.new("RGB", (96, 64)))), "image/png")
    answer = client.post("/v1/jobs", data={"prompt": "a fox", "n": "2"}, files={"image": photo})
    assert answer.status_code == 202, answer.text
    done = wait_for(client, answer.json())
    assert (done["params"]["references"], done["params"]["n"]) == (1, 2)


def test_priority_previews_and_time_limit_hold_for_jobs(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    with live.client() as client:
        first = accept(client, "first")
        wait_until(live.pipeline.started.is_set)
        hopeless = accept(client, "hopeless", timeout_s=0.2)
        batch = accept(client, "batch", priority="batch", previews=2, steps=8)
        urgent = accept(client, "urgent", priority="interactive")
        time.sleep(0.3)
        live.pipeline.gate.set()
        assert wait_for(client, hopeless, "failed")["error"]["code"] == "timeout"
        for job in (first, batch, urgent):
            wait_for(client, job)
        assert live.pipeline.ran == ["first", "urgent", "batch"]
        assert len(live.pipeline.decoded) == 2
        refused = client.post("/v1/jobs", json={"prompt": "x", "stream": True})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "stream")
        refused = client.post("/v1/jobs", json={"prompt": "x", "timeout_s": 1e9})
        assert "above 0 to 604800" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x", "stepz": 3}, 400, "stepz"),
        ({"prompt": "x", "width": 500}, 400, "width"),
        ({"prompt": "unfit"}, 400, "images"),
        ({"prompt": "x", "images": ["nothing"]}, 400, "images[0]"),
        ({}, 400, "prompt"),
    ],
)
def test_what_can_never_work_is_refused_at_once(
    start: Start, data: str, body: dict[str, Any], status: int, param: str
) -> None:
    client = start(data_dir=data)
    refused = client.post("/v1/jobs", json=body)
    assert refused.status_code == status and error_of(refused)["param"] == param
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_failed_job_tells_why(start: Start, data: str) -> None:
    client = start(data_dir=data)
    failed = wait_for(client, accept(client, "oom"), "failed")
    assert failed["error"]["code"] == "out_of_memory" and failed["images"] == []
    refused = client.get(f"/v1/jobs/{failed['id']}/images/0")
    assert refused.status_code == 404 and error_of(refused)["code"] == "no_image"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/nothing",
        "/v1/jobs/..%2f..%2fetc%2fpasswd",
        f"/v1/jobs/{NO_JOB}",
        f"/v1/jobs/{NO_JOB}/events",
        f"/v1/jobs/{NO_JOB}/images/0",
    ],
)
def test_what_does_not_exist_is_404(start: Start, data: str, path: str) -> None:
    client = start(data_dir=data)
    for ask in (client.get, client.delete):
        refused = ask(path)
        assert refused.status_code in (404, 405)
        error_of(refused)


@pytest.mark.parametrize("name", ["9", "1", "-1", "x", "0.png.png", "..%2f0.png", "00000", "%00"])
def test_pictures_are_called_by_their_number_only(start: Start, data: str, name: str) -> None:
    client = start(data_dir=data)
    done = wait_for(client, accept(client))
    assert client.get(f"/v1/jobs/{done['id']}/images/{name}").status_code == 404


def test_pictures_whose_files_are_gone_are_404(start: Start, data: str) -> None:
    client = start(data_dir=data)
    done = wait_for(client, accept(client))
    (Path(data) / "results" / done["id"] / "0.png").unlink()
    assert client.get(done["images"][0]["url"]).status_code == 404


def test_a_job_is_cancelled_wherever_it_stands(start_live: StartLive, data: str) -> None:
    live = start_live(settings={"data_dir": data})
    live.pipeline.close_gate()
    with live.client() as client:
        running, queued = accept(client, "running"), accept(client, "queued")
        wait_until(lambda: look(client, running)["status"] == "running")
        stream = Later(lambda: client.get(running["urls"]["events"]))
        for job in (running, queued):
            cancelled = client.delete(job["urls"]["job"])
            assert cancelled.status_code == 200 and cancelled.json()["status"] == "cancelled"
            assert look(client, job)["status"] == "cancelled"
        live.pipeline.gate.set()
        assert events_in(stream.answer().text)[-1][1] == "cancelled"
        wait_for(client, accept(client, "last"))
        assert live.pipeline.ended == ["last"]


def test_what_has_ended_stays_unless_it_is_forgotten(start: Start, data: str) -> None:
    client = start(data_dir=data)
    done = wait_for(client, accept(client))
    assert client.delete(done["urls"]["job"]).json() == done
    assert client.get(done["images"][0]["url"]).status_code == 200
    assert client.delete(f"{done['urls']['job']}?forget=true").json() == done
    assert client.get(done["urls"]["job"]).status_code == 404
    assert client.get(done["images"][0]["url"]).status_code == 404
    assert list((Path(data) / "results").iterdir()) == []
    # A job that has not ended is cancelled first.
    job = accept(client)
    client.delete(f"{job['urls']['job']}?forget=true")
    wait_until(lambda: client.get(job["urls"]["job"]).status_code == 404)


def test_pages_hold_every_job_once(start: Start, data: str) -> None:
    client = start(data_dir=data)
    jobs = [accept(client)["id"] for _ in range(7)]
    failed = accept(client, "oom")
    wait_for(client, failed, "failed")
    seen, after = [], ""
    while True:
        page = client.get(f"/v1/jobs?limit=3{after}").json()
        assert page["object"] == "list" and len(page["data"]) <= 3
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            assert page["next"] is None
            break
        after = f"&after={page['next']}"
    assert seen == [failed["id"], *reversed(jobs)]
    only = client.get("/v1/jobs?status=failed").json()["data"]
    assert [job["id"] for job in only] == [failed["id"]]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("after=x", "after"),
        (f"after={NO_JOB}", "after"),
        ("status=lost", "status"),
    ],
)
def test_a_wrong_query_says_what_is_allowed(
    start: Start, data: str, query: str, param: str
) -> None:
    client = start(data_dir=data)
    refused = client.get(f"/v1/jobs?{query}")
    assert refused.status_code == 400 and error_of(refused)["param"] == param


def test_jobs_belong_to_the_key_that_made_them(start: Start, data: str) -> None:
    keys = {name: name * 20 for name in ("ann", "bob")}
    entries = tuple(ApiKey(name, digest_of(key)).entry for name, key in keys.items())
    client = start(data_dir=data, api_keys=entries)
    ann, bob = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    job = client.post("/v1/jobs", json={"prompt": "a fox"}, headers=ann).json()
    assert client.get(job["urls"]["job"], headers=ann).status_code == 200
    for path in ("", "/events", "/images/0"):
        assert client.get(f"/v1/jobs/{job['id']}{path}", headers=bob).status_code == 404
    assert client.delete(job["urls"]["job"], headers=bob).status_code == 404
    assert client.get("/v1/jobs", headers=bob).json()["data"] == []
    assert client.get(f"/v1/jobs?after={job['id']}", headers=bob).status_code == 400
    assert client.get(f"/v1/jobs?after={job['id']}", headers=ann).json()["data"] == []
    assert len(client.get("/v1/jobs", headers=ann).json()["data"]) == 1
    assert client.get(job["urls"]["job"]).status_code == 401


def test_too_many_unfinished_jobs_are_refused(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    client = start(pipeline, data_dir=data, job_limit=3)
    for _ in range(3):
        accept(client)
    refused = client.post("/v1/jobs", json={"prompt": "a fox"})
    assert refused.status_code == 429 and error_of(refused)["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    pipeline.gate.set()


def test_a_repeated_request_is_one_job(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    client = start(pipeline, data_dir=data)

    def ask(prompt: str) -> httpx2.Response:
        headers = {"Idempotency-Key": "k"}
        return client.post("/v1/jobs", json={"prompt": prompt}, headers=headers)

    first, again, other = ask("a fox"), ask("a fox"), ask("a crow")
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert other.status_code == 422
    assert error_of(other)["code"] == "idempotency_key_reused"
    done = wait_for(client, first.json())
    # Later the repetition tells how that job stands.
    assert ask("a fox").json() == done
    assert pipeline.ran == ["a fox"]


def test_requests_that_repeat_each_other_at_once_are_one_job(
    start_live: StartLive, data: str
) -> None:
    live = start_live(settings={"data_dir": data})

    def ask() -> httpx2.Response:
        with live.client() as client:
            body = {"prompt": "a fox", "width": 64, "height": 64}
            return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})

    answers = [later.answer() for later in [Later(ask) for _ in range(10)]]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    with live.client() as client:
        wait_for(client, answers[0].json())
        assert len(client.get("/v1/jobs").json()["data"]) == 1
    assert live.pipeline.ran == ["a fox"]


def test_kept_jobs_are_seen_in_the_metrics(start: Start, data: str) -> None:
    pipeline = FakePipeline()
    pipeline.close_gate()
    client = start(pipeline, data_dir=data)
    job = accept(client)
    assert "fluxd_kept_jobs 1.0" in client.get("/metrics").text
    pipeline.gate.set()
    wait_for(client, job)
    wait_until(lambda: "fluxd_kept_jobs 0.0" in client.get("/metrics").text)
    assert "fluxd_kept_disk_failing 0.0" in client.get("/metrics").text
    assert 'fluxd_webhooks_total{result="given_up"} 0.0' in client.get("/metrics").text


def test_without_a_data_directory_there_are_no_jobs(start: Start) -> None:
    client = start()
    for ask in (
        lambda: client.post("/v1/jobs", json={"prompt": "a fox"}),
        lambda: client.get("/v1/jobs"),
        lambda: client.get(f"/v1/jobs/{NO_JOB}"),
        lambda: client.delete(f"/v1/jobs/{NO_JOB}"),
    ):
        refused = ask()
        assert refused.status_code == 404 and error_of(refused)["code"] == "jobs_off"


def test_a_disk_that_takes_nothing_is_said(
    start: Start, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(data_dir=data)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JobFiles, "write_inputs", full)
    refused = client.post("/v1/jobs", json={"prompt": "a fox"})
    assert refused.status_code == 503 and error_of(refused)["code"] == "storage_failed"
    assert "space" not in refused.text and data not in refused.text


def test_many_clients_at_once_leave_a_clean_house(
    start_live: StartLive, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    live = start_live(FakePipeline(slice_s_at_512=0.05), settings={"data_dir": data})
    picture = encode(Image.effect_noise((96, 64), 80.0).convert("RGB"))
    jobs: list[dict[str, Any]] = []

    def behave(number: int) -> httpx2.Response:
        chance = random.Random(number)
        with live.client() as client:
            for _ in range(6):
                given: dict[str, Any] = {"priority": chance.choice(["batch", "normal"])}
                if chance.random() < 0.3:
                    given |= {"images": [picture], "width": None, "height": None}
                prompt = chance.choice(["a fox"] * 6 + ["oom", "fail"])
                job = accept(client, prompt, previews=chance.choice([0, 1]), **given)
                jobs.append(job)
                match chance.choice(["cancel", "watch", "leave", "look", "nothing"]):
                    case "cancel":
                        assert client.delete(job["urls"]["job"]).status_code == 200
                    case "watch":
                        last = events_in(client.get(job["urls"]["events"]).text)[-1][1]
                        assert last in ("completed", "failed")
                    case "leave":
                        with client.stream("GET", job["urls"]["events"]) as stream:
                            next(stream.iter_lines())
                    case "look":
                        look(client, job)
            return client.get("/v1/jobs?limit=100")

    for later in [Later(partial(behave, number)) for number in range(16)]:
        assert later.answer().status_code == 200
    with live.client() as client:
        wait_until(lambda: "fluxd_kept_jobs 0.0" in client.get("/metrics").text)
        statuses = {job["id"]: look(client, job)["status"] for job in jobs}
    assert len(statuses) == 16 * 6
    assert set(statuses.values()) == {"completed", "failed", "cancelled"}
    completed = {job_id for job_id, status in statuses.items() if status == "completed"}
    assert {path.name for path in (Path(data) / "results").iterdir()} == completed
    for left in ("inputs", "staging"):
        assert list((Path(data) / left).iterdir()) == []
    # Each one that was drawn to its end is there, once.
    assert len(live.pipeline.ended) >= len(completed)
    wrong = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("app.jobs") and record.levelno >= logging.WARNING
    ]
    assert wrong == []
