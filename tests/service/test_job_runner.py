"""Kept jobs: run once each, whatever happens to the process or to the disk."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.engine import (
    Engine,
    JobEvent,
    JobOutcome,
    Packing,
    Preview,
    Queued,
    Settled,
    Started,
    StepDone,
)
from app.jobs import runner as runner_module
from app.jobs.files import JobFiles, new_job_id
from app.jobs.opening import MOST_IN_ENGINE, Kept, open_kept
from app.jobs.records import JobRecord, JobStatus, NewJob, StoredRequest
from app.jobs.retention import Retention, SweepBudget
from app.jobs.runner import MOST_ATTEMPTS, JobRunner
from app.jobs.store import JobStore
from app.main import create_engine
from app.settings import SettingsError
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S, settings_for_tests, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, loader_of


@dataclass
class SeeingPipeline(FakePipeline):
    """Remembers what it was asked to draw."""

    seen: list[GenerationParams] = field(default_factory=list)

    def run(self, params: GenerationParams) -> Generator[FakeSlice, None, FakeResult]:
        self.seen.append(params)
        return super().run(params)


@dataclass
class Service:
    """An engine around a fake pipeline, and the jobs that are kept for it."""

    engine: Engine
    kept: Kept
    pipeline: SeeingPipeline

    @property
    def runner(self) -> JobRunner:
        return self.kept.jobs

    def accept(self, prompt: str = "a fox", **given: Any) -> str:
        asked = {name: given.pop(name) for name in ("references", "mask") if name in given}
        options = {"seed": 3, "n": given.pop("n", 1), **asked}
        params = GenerationParams(prompt=prompt, **options)
        new = NewJob(
            id=new_job_id(),
            client="local",
            request_id="req_1",
            priority=given.pop("priority", "normal"),
            created_s=time.time(),
            deadline_s=given.pop("deadline_s", None),
            request=StoredRequest.of(params, Packing("png"), previews=given.pop("previews", 0)),
        )
        accepted = self.runner.accept(new, params)
        assert not accepted.is_repeat and not given
        return accepted.record.id

    def record(self, job_id: str) -> JobRecord:
        return self.runner.store.get(job_id).result()

    def wait(self, job_id: str, status: JobStatus = JobStatus.COMPLETED) -> JobRecord:
        wait_until(lambda: self.record(job_id).status is status)
        return self.record(job_id)

    def end(self) -> None:
        self.engine.stop()
        self.kept.close()


Open = Callable[..., Service]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def start_jobs(data: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def begin(
            directory: Path = data, pipeline: SeeingPipeline | None = None, **given: Any
        ) -> Service:
            fake = pipeline or SeeingPipeline()
            settings = settings_for_tests(data_dir=str(directory), **given)
            engine = create_engine(settings, loader_of(fake))
            kept = open_kept(settings, engine)
            assert kept is not None
            service = Service(engine, kept, fake)
            engine.start()
            kept.start()
            stack.callback(service.end)
            stack.callback(fake.gate.set)
            wait_until(lambda: engine.status().is_ready)
            return service

        yield begin


def files_of(data: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (data / kind).iterdir())


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


def test_a_database_that_fails_delays_jobs_and_loses_none(
    start_jobs: Open, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "DISK_RETRY_S", 0.05)
    service = start_jobs()
    complete, tried = JobStore.complete, []

    def fail_twice(store: JobStore, job_id: str, outcome: JobOutcome) -> Future[bool]:
        tried.append(job_id)
        if len(tried) <= 2:
            failed: Future[bool] = Future()
            failed.set_exception(sqlite3.OperationalError("database or disk is full"))
            return failed
        return complete(store, job_id, outcome)

    monkeypatch.setattr(JobStore, "complete", fail_twice)
    job_id = service.accept()
    service.wait(job_id)
    assert tried == [job_id] * 3 and files_of(data, "results") == [job_id]
    assert service.pipeline.ran == ["a fox"]


def test_a_database_that_cannot_be_read_for_long_fills_no_memory(
    start_jobs: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "TICK_S", 0.001)
    monkeypatch.setattr(runner_module, "DISK_RETRY_S", 0.2)
    service = start_jobs()
    get, tried = JobStore.get, []

    def fail_thrice(store: JobStore, job_id: str) -> Future[JobRecord]:
        if threading.current_thread().name != "fluxd-jobs":
            return get(store, job_id)
        tried.append(job_id)
        if len(tried) <= 3:
            failed: Future[JobRecord] = Future()
            failed.set_exception(sqlite3.OperationalError("disk I/O error"))
            return failed
        return get(store, job_id)

    monkeypatch.setattr(JobStore, "get", fail_thrice)
    began_s = time.monotonic()
    service.wait(service.accept())
    # Tried as often as is meant, not at every turn of the thread, ...
    assert time.monotonic() - began_s >= 3 * 0.2
    # ... and nothing is left to be tried.
    wait_until(lambda: not service.kept.jobs.is_disk_failing)


def test_a_full_disk_delays_jobs_and_loses_none(
    start_jobs: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "DISK_RETRY_S", 0.05)
    service = start_jobs()
    write, tried = JobFiles.write_results, []

    def fail_twice(files: JobFiles, job_id: str, pictures: Sequence[Any]) -> None:
        tried.append(job_id)
        if len(tried) <= 2:
            raise OSError(28, "No space left on device")
        write(files, job_id, pictures)

    monkeypatch.setattr(JobFiles, "write_results", fail_twice)
    job_id = service.accept()
    service.wait(job_id)
    assert tried == [job_id] * 3
    assert service.pipeline.ran == ["a fox"]


def test_pictures_stay_when_the_disk_fails_just_after_the_end(
    start_jobs: Open, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "DISK_RETRY_S", 0.05)
    service = start_jobs()
    remove, tried = JobFiles.remove_inputs, []

    def fail_once(files: JobFiles, job_id: str) -> None:
        tried.append(job_id)
        if len(tried) == 1:
            raise OSError(5, "Input/output error")
        remove(files, job_id)

    monkeypatch.setattr(JobFiles, "remove_inputs", fail_once)
    job_id = service.accept()
    service.wait(job_id)
    wait_until(lambda: not service.runner.unfinished)
    assert len(tried) == 2 and files_of(data, "results") == [job_id]


def test_finished_jobs_are_removed_by_age_and_by_size(start_jobs: Open, data: Path) -> None:
    service = start_jobs()
    first = service.accept()
    size = service.wait(first).kept_bytes
    service.end()
    by_size = start_jobs()
    by_size.runner._retention = Retention(1000.0, 2 * size)
    by_size.runner._budget = SweepBudget(2 * size)
    ids = [first, by_size.accept(), by_size.accept()]
    wait_until(lambda: files_of(data, "results") == sorted(ids[1:]))
    assert by_size.runner.store.ids().result() == set(ids[1:])
    by_size.end()
    start_jobs(job_retention_s=0.0)
    wait_until(lambda: files_of(data, "results") == [])


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


def test_a_directory_in_use_or_unusable_is_a_clear_error(start_jobs: Open, data: Path) -> None:
    service = start_jobs()
    settings = settings_for_tests(data_dir=str(data))
    with pytest.raises(SettingsError, match=r"in use by another fluxd; .*data_dir=off"):
        open_kept(settings, service.engine)
    service.end()
    (data / "jobs.sqlite3").write_bytes(b"this is no database" * 100)
    for _ in range(2):
        with pytest.raises(SettingsError, match="not a database"):
            open_kept(settings, service.engine)
