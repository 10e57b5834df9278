"""Kept jobs after the process has ended, in whatever way."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from app.engine import JobEvent, Settled
from app.jobs.files import new_job_id
from app.jobs.opening import MOST_IN_ENGINE
from app.jobs.records import JobStatus
from app.jobs.runner import MOST_ATTEMPTS
from tests.service.conftest import PATIENCE_S, wait_until
from tests.service.job_runner.conftest import Open, SeeingPipeline, files_of


def test_pictures_of_a_waiting_job_survive_a_crash(start_jobs: Open, data: Path) -> None:
    first = start_jobs()
    first.pipeline.close_gate()
    reference = Image.effect_noise((96, 64), 80.0).convert("RGB")
    mask = Image.new("L", (96, 64), 255)
    job_id = first.accept("repaint", references=(reference,), mask=mask)
    wait_until(lambda: first.record(job_id).status is JobStatus.RUNNING)
    # What a disk holds when the process is gone in this moment.
    after_crash = data.parent / "after-crash"
    shutil.copytree(data, after_crash)
    second = start_jobs(after_crash)
    second.wait(job_id)
    (params,) = second.pipeline.seen
    assert params.prompt == "repaint" and params.seed == 3
    assert params.references[0].tobytes() == reference.tobytes()
    assert params.mask is not None and params.mask.tobytes() == mask.tobytes()
    assert second.record(job_id).attempts == 2
    wait_until(lambda: files_of(after_crash, "inputs") == [])


@pytest.mark.parametrize(("grace_s", "done_before"), [(PATIENCE_S, 1), (0.0, 0)])
def test_an_orderly_end_interrupts_jobs_which_go_on_later(
    start_jobs: Open, grace_s: float, done_before: int
) -> None:
    first = start_jobs()
    first.pipeline.close_gate()
    ids = [first.accept(f"job {i}") for i in range(MOST_IN_ENGINE + 2)]
    wait_until(lambda: first.record(ids[0]).status is JobStatus.RUNNING)
    heard: dict[str, list[JobEvent]] = {job_id: [] for job_id in ids}
    for job_id in ids:
        first.runner.watch(job_id, heard[job_id].append)
    ending = threading.Thread(target=first.engine.stop, args=(grace_s,))
    ending.start()
    wait_until(lambda: first.engine.status().queue_depth == 0)
    if not grace_s:
        running = first.runner._live[ids[0]].job
        wait_until(lambda: running is not None and running.cancelled is not None)
    first.pipeline.gate.set()
    ending.join()
    first.end()
    for job_id in ids:
        assert isinstance(heard[job_id][-1], Settled)
    second = start_jobs()
    records = [second.wait(job_id) for job_id in ids]
    # An interruption is not counted against a job.
    assert {record.attempts for record in records} == {1}
    assert len(first.pipeline.ended) == done_before
    assert second.pipeline.ended == [f"job {i}" for i in range(done_before, len(ids))]


def test_a_job_that_ends_the_process_again_and_again_is_given_up(
    start_jobs: Open, data: Path
) -> None:
    first = start_jobs()
    first.pipeline.close_gate()
    deadly, innocent = first.accept("deadly"), first.accept("innocent")
    wait_until(lambda: first.record(deadly).status is JobStatus.RUNNING)
    for _ in range(MOST_ATTEMPTS - 1):
        assert first.runner.store.start(deadly).result()
    assert first.runner.store.start(innocent).result()
    after_crash = data.parent / "after-crash"
    shutil.copytree(data, after_crash)
    second = start_jobs(after_crash)
    error = second.wait(deadly, JobStatus.FAILED).error
    assert error is not None and error["code"] == "crashed"
    second.wait(innocent)
    assert second.pipeline.ran == ["innocent"]


def test_what_was_running_at_a_crash_runs_alone(start_jobs: Open, data: Path) -> None:
    first = start_jobs()
    first.pipeline.close_gate()
    ids = [first.accept(f"job {i}") for i in range(4)]
    wait_until(lambda: first.record(ids[0]).status is JobStatus.RUNNING)
    assert first.runner.store.start(ids[1]).result()
    after_crash = data.parent / "after-crash"
    shutil.copytree(data, after_crash)
    pipeline = SeeingPipeline()
    pipeline.close_gate()
    second = start_jobs(after_crash, pipeline)
    wait_until(pipeline.started.is_set)
    time.sleep(0.3)
    assert second.engine.status().queue_depth == 0
    pipeline.gate.set()
    for job_id in ids:
        second.wait(job_id)
    assert pipeline.ended == [f"job {i}" for i in range(4)]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_job_whose_pictures_were_lost_fails_and_the_next_one_runs(
    start_jobs: Open, data: Path, is_damaged: bool
) -> None:
    first = start_jobs()
    first.pipeline.close_gate()
    first.accept()
    references = (Image.new("RGB", (64, 64), "red"),)
    lost = first.accept("lost", references=references)
    following = first.accept("following")
    after_crash = data.parent / "after-crash"
    shutil.copytree(data, after_crash)
    if is_damaged:
        path = after_crash / "inputs" / lost / "0.png"
        path.write_bytes(path.read_bytes().replace(b"\0\0\0\rIHDR", b"\0\0\0\1IHDR"))
    else:
        shutil.rmtree(after_crash / "inputs")
    second = start_jobs(after_crash)
    error = second.wait(lost, JobStatus.FAILED).error
    assert error is not None and "lost" in str(error["message"])
    second.wait(following)
    assert second.pipeline.ran == ["a fox", "following"]


def test_what_a_crash_left_on_its_way_is_swept_at_the_start(start_jobs: Open, data: Path) -> None:
    first = start_jobs()
    first.pipeline.close_gate()
    kept = first.accept()
    wait_until(lambda: first.record(kept).status is JobStatus.RUNNING)
    after_crash = data.parent / "after-crash"
    shutil.copytree(data, after_crash)
    never_accepted = new_job_id()
    for kind in ("inputs", "results"):
        (after_crash / kind / never_accepted).mkdir()
    # Written, but not yet said to be there: it is drawn again.
    (after_crash / "results" / kept).mkdir()
    (after_crash / "results" / kept / "0.png").write_bytes(b"half a job")
    second = start_jobs(after_crash)
    second.wait(kept)
    wait_until(lambda: files_of(after_crash, "inputs") == [])
    assert files_of(after_crash, "results") == [kept]
    assert second.runner.files.read_result(kept, 0, "png").startswith(b"\x89PNG")
