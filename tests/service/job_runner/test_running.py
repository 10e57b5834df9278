"""Kept jobs run once each, in their order; what is watched and cancelled of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.engine import JobEvent, Preview, Queued, Settled, Started, StepDone
from app.jobs.files import JobFiles
from app.jobs.opening import MOST_IN_ENGINE
from app.jobs.records import JobRecord, JobStatus
from app.jobs.store import JobStore
from tests.service.conftest import wait_until
from tests.service.job_runner.conftest import Open, files_of


def test_a_job_is_run_and_its_pictures_are_kept(start_jobs: Open, data: Path) -> None:
    service = start_jobs()
    job_id = service.accept(n=2)
    done = service.wait(job_id)
    assert done.attempts == 1 and done.outcome is not None
    assert [picture["seed"] for picture in done.outcome["pictures"]] == [3, 4]
    sizes = [picture["bytes"] for picture in done.outcome["pictures"]]
    read = [service.runner.files.read_result(job_id, i, "png") for i in range(2)]
    assert [len(picture) for picture in read] == sizes and read[0].startswith(b"\x89PNG")
    assert done.kept_bytes > sum(sizes)


def test_a_watcher_hears_the_end_when_it_is_on_the_disk(start_jobs: Open) -> None:
    service = start_jobs()
    service.pipeline.close_gate()
    heard: list[JobEvent] = []
    at_the_end: list[JobStatus] = []
    job_id = service.accept(previews=2)

    def listen(event: JobEvent) -> None:
        heard.append(event)
        if isinstance(event, Settled):
            at_the_end.append(service.record(job_id).status)

    service.runner.watch(job_id, listen)
    assert service.runner.current(job_id)
    service.pipeline.gate.set()
    wait_until(lambda: at_the_end)
    assert at_the_end == [JobStatus.COMPLETED]
    kinds = [type(event) for event in heard if not isinstance(event, Queued)]
    assert kinds[0] is Started and kinds[-1] is Settled
    assert kinds.count(StepDone) == 4 and kinds.count(Preview) == 2
    assert service.runner.current(job_id) == []
    # Who comes too late hears that there is nothing more to hear.
    late: list[JobEvent] = []
    service.runner.watch(job_id, late.append)()
    assert late == [Settled()]


def test_those_that_wait_behind_the_engine_are_told_their_place(start_jobs: Open) -> None:
    service = start_jobs()
    service.pipeline.close_gate()
    ids = [service.accept(f"job {i}") for i in range(MOST_IN_ENGINE + 3)]
    wait_until(lambda: service.engine.status().queue_depth == MOST_IN_ENGINE - 1)
    # The engine has no more of them than it may.
    time.sleep(0.3)
    assert service.engine.status().queue_depth == MOST_IN_ENGINE - 1
    places: list[int] = []
    service.runner.watch(
        ids[-1], lambda e: places.append(e.position) if isinstance(e, Queued) else None
    )
    assert places == [MOST_IN_ENGINE + 2]
    service.pipeline.gate.set()
    service.wait(ids[-1])
    assert places == sorted(places, reverse=True) and len(places) > 2
    assert service.pipeline.ended == [f"job {i}" for i in range(MOST_IN_ENGINE + 3)]


def test_a_class_goes_before_the_next_one(start_jobs: Open) -> None:
    service = start_jobs()
    service.pipeline.close_gate()
    first = [service.accept(f"first {i}") for i in range(MOST_IN_ENGINE)]
    wait_until(lambda: service.engine.status().queue_depth == MOST_IN_ENGINE - 1)
    ids = [service.accept(name, priority=name) for name in ("batch", "normal", "interactive")]
    service.pipeline.gate.set()
    for job_id in [*first, *ids]:
        service.wait(job_id)
    ended = [prompt for prompt in service.pipeline.ended if not prompt.startswith("first")]
    assert ended == ["interactive", "normal", "batch"]


def test_accepted_jobs_and_the_queue_do_not_stand_in_each_others_way(start_jobs: Open) -> None:
    service = start_jobs(queue_limit=1)
    service.pipeline.close_gate()
    ids = [service.accept() for _ in range(5)]
    wait_until(lambda: service.engine.status().queue_depth == 4)
    # Nor do they take the room of those who wait for an answer.
    service.engine.check_admission("local")
    service.pipeline.gate.set()
    for job_id in ids:
        service.wait(job_id)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("oom", "out_of_memory"),
        ("fail", "internal_error"),
        ("unpackable", "internal_error"),
        ("unfit", "invalid_value"),
    ],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(
    start_jobs: Open, prompt: str, code: str
) -> None:
    service = start_jobs()
    failed, good = service.accept(prompt), service.accept()
    error = service.wait(failed, JobStatus.FAILED).error
    assert error is not None and error["code"] == code
    assert "/secret" not in str(error)
    service.wait(good)


def test_a_cancelled_job_stops_or_never_runs(start_jobs: Open, data: Path) -> None:
    service = start_jobs()
    service.pipeline.close_gate()
    references = (Image.new("RGB", (64, 64), "red"),)
    ids = [service.accept(f"job {i}", references=references) for i in range(MOST_IN_ENGINE + 2)]
    wait_until(lambda: service.pipeline.started.is_set())
    wait_until(lambda: service.engine.status().queue_depth == MOST_IN_ENGINE - 1)
    running, in_engine, on_disk = ids[0], ids[3], ids[-1]
    heard: list[JobEvent] = []
    service.runner.watch(running, heard.append)
    for job_id in (running, in_engine, on_disk):
        assert service.runner.cancel(job_id)
        assert service.record(job_id).status is JobStatus.CANCELLED
        assert not service.runner.cancel(job_id)
    wait_until(lambda: any(isinstance(event, Settled) for event in heard))
    service.pipeline.gate.set()
    kept = [job_id for job_id in ids if job_id not in (running, in_engine, on_disk)]
    for job_id in kept:
        service.wait(job_id)
    assert "job 0" in service.pipeline.abandoned
    assert not {"job 3", f"job {len(ids) - 1}"} & set(service.pipeline.ran)
    wait_until(lambda: files_of(data, "inputs") == [])
    assert files_of(data, "results") == sorted(kept)


def test_a_job_cancelled_in_the_last_moment_leaves_no_pictures(
    start_jobs: Open, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start_jobs()
    write = JobFiles.write_results

    def cancel_first(files: JobFiles, job_id: str, pictures: Sequence[Any]) -> None:
        service.runner.store.cancel(job_id).result()
        write(files, job_id, pictures)

    monkeypatch.setattr(JobFiles, "write_results", cancel_first)
    job_id = service.accept()
    service.wait(job_id, JobStatus.CANCELLED)
    wait_until(lambda: not service.runner.current(job_id))
    assert files_of(data, "results") == []


def test_a_waiting_job_that_is_forgotten_leaves_no_trace_in_the_log(
    start_jobs: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_jobs()
    read = JobStore.get

    def forget_first(store: JobStore, job_id: str) -> Future[JobRecord]:
        # As a client does just before the thread comes to the job.
        monkeypatch.setattr(JobStore, "get", read)
        assert service.runner.cancel(job_id) and service.runner.remove(job_id)
        return read(store, job_id)

    monkeypatch.setattr(JobStore, "get", forget_first)
    job_id = service.accept("forgotten")
    wait_until(lambda: service.runner.unfinished == 0)
    service.wait(service.accept())
    assert service.pipeline.ran == ["a fox"] and not service.runner.current(job_id)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_deadline_is_kept_on_the_disk_and_in_the_engine(start_jobs: Open) -> None:
    service = start_jobs()
    service.pipeline.close_gate()
    for _ in range(MOST_IN_ENGINE):
        service.accept()
    late = service.accept("late", deadline_s=time.time() + 0.2)
    error = service.wait(late, JobStatus.FAILED).error
    assert error is not None and error["code"] == "timeout"
    service.pipeline.gate.set()
