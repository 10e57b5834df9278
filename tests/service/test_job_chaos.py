"""Killed again and again while jobs come in: none is lost, none is done twice."""

from __future__ import annotations

import random
import signal
import sqlite3
import sys
import time
from functools import partial
from pathlib import Path

import httpx2
import pytest

from app.jobs.runner import MOST_ATTEMPTS
from app.jobs.schema import DATABASE_FILE
from tests.service.conftest import PATIENCE_S, wait_until
from tests.service.processes import ServerProcess

SLOW = (sys.executable, "-m", "tests.service.slow_server")
JOBS, KILLS = 40, 12


def ask_until_accepted(url: str, name: str) -> str | None:
    """The id of the job, or None when the service was killed before it answered."""
    try:
        answer = httpx2.post(
            f"{url}/v1/jobs",
            json={"prompt": name, "width": 64, "height": 64, "steps": 1},
            headers={"Idempotency-Key": name},
            timeout=PATIENCE_S,
        )
    except httpx2.TransportError:
        return None
    if answer.status_code == 503:
        # Not ready yet.
        time.sleep(0.05)
        return None
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def finish_all(url: str, ids: dict[str, str]) -> None:
    """Wait for every job's end, asking for each of them once more."""

    def is_final(job_id: str) -> bool:
        status = httpx2.get(f"{url}/v1/jobs/{job_id}", timeout=PATIENCE_S).json()["status"]
        return status in ("completed", "failed")

    wait_until(lambda: httpx2.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200)
    for name, job_id in ids.items():
        assert ask_until_accepted(url, name) == job_id
        wait_until(partial(is_final, job_id))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_jobs_are_finished_once_each_whenever_the_service_is_killed(
    tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    names = [f"job {i}" for i in range(JOBS)]
    ids: dict[str, str] = {}
    ended: dict[str, float] = {}
    for kill in range(KILLS + 1):
        is_last = kill == KILLS
        with ServerProcess(*SLOW, FLUXD_DATA_DIR=str(tmp_path)) as server:
            url = server.url()
            killed_s = time.monotonic() + chance.uniform(0.1, 1.5)
            while is_last or time.monotonic() < killed_s:
                name = next((name for name in names if name not in ids), None)
                if name is None:
                    break
                found = ask_until_accepted(url, name)
                if found is not None:
                    ids[name] = found
                if not is_last and chance.random() < 0.7:
                    time.sleep(chance.uniform(0.0, 0.1))
            if is_last:
                finish_all(url, ids)
            else:
                time.sleep(max(0.0, killed_s - time.monotonic()))
            server.signal(signal.SIGTERM if is_last else signal.SIGKILL)
            server.status()
            assert "Traceback" not in server.output, server.output
        database = sqlite3.connect(tmp_path / DATABASE_FILE)
        rows = database.execute("SELECT id, status, finished_s, attempts FROM jobs").fetchall()
        database.close()
        for job_id, status, finished_s, attempts in rows:
            assert attempts <= MOST_ATTEMPTS
            if status in ("completed", "failed"):
                # Once it has ended it never ends again.
                assert ended.setdefault(job_id, finished_s) == finished_s
    # As many as were asked for: nothing was lost, and no repetition made a second one.
    assert len(ids) == len(set(ids.values())) == len(rows) == JOBS
    assert set(ended) == set(ids.values())
    results = {path.name for path in (tmp_path / "results").iterdir()}
    completed = {job_id for job_id, status, _, _ in rows if status == "completed"}
    assert results == completed
    # Only what was killed three times while it ran may have been given up.
    given_up = {job_id for job_id, status, _, attempts in rows if status == "failed"}
    assert all(a == MOST_ATTEMPTS for i, _, _, a in rows if i in given_up)
    assert list((tmp_path / "inputs").iterdir()) == []
