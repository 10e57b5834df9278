"""``/v1/jobs`` across restarts, kills and signals."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import httpx2
from PIL import Image

from tests.service.conftest import PATIENCE_S, Later, StartLive, encode, wait_until
from tests.service.fake_pipeline import FakeModel, FakePipeline
from tests.service.kept_jobs import accept, events_in, look, wait_for
from tests.service.processes import FLUXD, ServerProcess

SLOW = (sys.executable, "-m", "tests.service.slow_server")


def wait_ready(url: str) -> None:
    wait_until(lambda: httpx2.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200)


def finished_lines(server: ServerProcess) -> int:
    return sum("job done" in line for line in server.lines)


def test_ten_accepted_jobs_survive_a_kill_and_finish_once_each(data: str) -> None:
    picture = encode(Image.effect_noise((96, 64), 80.0).convert("RGB"))
    with ServerProcess(*SLOW, FLUXD_DATA_DIR=data) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            plain = [accept(client, f"job {i}") for i in range(8)]
            drawn_from = [
                accept(client, f"from {i}", width=None, height=None, images=[picture])
                for i in range(2)
            ]
            jobs = [*plain, *drawn_from]
            wait_for(client, jobs[1])
            before = {job["id"]: look(client, job) for job in jobs}
        server.signal(signal.SIGKILL)
        server.status()
    done_before = {i for i, job in before.items() if job["status"] == "completed"}
    assert 2 <= len(done_before) < 10
    with ServerProcess(*SLOW, FLUXD_DATA_DIR=data) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            page = client.get("/v1/jobs?limit=100").json()
            assert [job["id"] for job in page["data"]] == [job["id"] for job in reversed(jobs)]
            after = {}
            for job in jobs:
                heard = events_in(client.get(f"/v1/jobs/{job['id']}/events").text)
                assert heard[-1][1] == "completed"
                after[job["id"]] = heard[-1][2]
            for job_id, job in after.items():
                (image,) = job["images"]
                fetched = client.get(f"/v1/jobs/{job_id}/images/0")
                assert len(fetched.content) == image["bytes"]
            # What had been finished was not done again ...
            for job_id in done_before:
                assert after[job_id]["finished"] == before[job_id]["finished"]
                assert after[job_id]["images"][0]["seed"] == before[job_id]["images"][0]["seed"]
            # ... and the rest was done once.
            assert finished_lines(server) == 10 - len(done_before)
        assert sorted(path.name for path in (Path(data) / "results").iterdir()) == sorted(after)
        assert list((Path(data) / "inputs").iterdir()) == []
        server.signal(signal.SIGTERM)
        assert server.status() == 0, server.output
        assert "Traceback" not in server.output


def test_a_signal_lets_watchers_go_and_jobs_go_on_later(data: str) -> None:
    with ServerProcess(*SLOW, "0.1", FLUXD_DATA_DIR=data) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            jobs = [accept(client, f"job {i}", steps=30) for i in range(2)]
            wait_until(lambda: look(client, jobs[0])["status"] == "running")
            streams = [
                Later(lambda job=job: httpx2.get(job["urls"]["events"], timeout=PATIENCE_S))
                for job in jobs
            ]
            wait_until(lambda: look(client, jobs[0])["progress"] is not None)
            server.signal(signal.SIGTERM)
            for stream in streams:
                names = [name for _, name, _ in events_in(stream.answer().text)]
                assert names and not {"completed", "failed", "cancelled"} & set(names)
        assert server.status() == 0, server.output
        assert "Traceback" not in server.output
    with ServerProcess(*SLOW, FLUXD_DATA_DIR=data) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            for job in jobs:
                wait_until(
                    lambda job=job: (
                        client.get(f"/v1/jobs/{job['id']}").json()["status"] == "completed"
                    )
                )


def test_the_same_picture_comes_of_a_job_that_is_run_again(
    tiny_checkpoint: Path, data: str
) -> None:
    command = (*FLUXD, "serve", "--model", str(tiny_checkpoint), "--port", "0")
    given = {"FLUXD_DATA_DIR": data, "FLUXD_WARM_UP_SIZES": "", "FLUXD_DEVICE": "cpu"}
    with ServerProcess(*command, **given) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            job = accept(client, steps=40)
            wait_until(lambda: look(client, job)["status"] == "running")
        server.signal(signal.SIGKILL)
        server.status()
    with ServerProcess(*command, **given) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url, timeout=PATIENCE_S) as client:
            path = f"/v1/jobs/{job['id']}"
            wait_until(lambda: client.get(path).json()["status"] == "completed")
            (image,) = client.get(path).json()["images"]
            body = {"prompt": "a fox", "width": 64, "height": 64, "steps": 40}
            png = {"Accept": "image/png"}
            again = client.post("/v1/generate", json={**body, "seed": image["seed"]}, headers=png)
            assert client.get(f"{path}/images/0").content == again.content


def test_a_job_s_defaults_are_those_of_the_model_that_accepted_it(
    start_live: StartLive, data: str
) -> None:
    first = start_live(settings={"data_dir": data})
    first.pipeline.close_gate()
    with first.client() as client:
        accept(client)
        first.pipeline.started.wait()
        job = client.post("/v1/jobs", json={"prompt": "a fox"}).json()
    first.engine.hurry()
    first.server.should_exit = True
    wait_until(lambda: first.engine.status().state in ("draining", "stopped"))
    first.pipeline.gate.set()
    first.thread.join(PATIENCE_S)
    larger = FakePipeline(info=FakeModel(default_side_px=128))
    with start_live(larger, settings={"data_dir": data}).client() as client:
        path = f"/v1/jobs/{job['id']}"
        wait_until(lambda: client.get(path).json()["status"] == "completed")
        done = client.get(path).json()
        assert (done["params"]["width"], done["params"]["height"]) == (64, 64)
        assert done["params"]["steps"] == 4
