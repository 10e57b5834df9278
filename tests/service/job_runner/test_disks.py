"""Kept jobs on a disk that fails, fills up, or is used by another."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from app.engine import JobOutcome
from app.errors import StorageError
from app.jobs import runner as runner_module
from app.jobs.files import JobFiles
from app.jobs.opening import open_kept
from app.jobs.records import JobRecord
from app.jobs.retention import Retention, SweepBudget
from app.jobs.store import JobStore
from app.settings import SettingsError
from tests.service.conftest import settings_for_tests, wait_until
from tests.service.job_runner.conftest import Open, files_of


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


@pytest.mark.parametrize("is_of_files", [False, True])
def test_a_refused_job_shows_that_the_disk_fails_until_it_takes_data_again(
    start_jobs: Open, data: Path, monkeypatch: pytest.MonkeyPatch, is_of_files: bool
) -> None:
    monkeypatch.setattr(runner_module, "DISK_RETRY_S", 0.05)
    service = start_jobs()
    probes: list[int] = []

    def fail(*_: Any) -> Any:
        probes.append(1)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(JobStore, "add", fail)
        full.setattr(JobFiles if is_of_files else JobStore, "probe", fail)
        with pytest.raises(StorageError):
            service.accept()
        wait_until(lambda: service.runner.is_disk_failing and len(probes) > 3)
    wait_until(lambda: not service.runner.is_disk_failing)
    service.wait(service.accept())
    assert files_of(data, "staging") == []


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
