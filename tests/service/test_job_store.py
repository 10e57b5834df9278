"""The records of accepted jobs: final once, in order, bounded, and there after a crash."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine import JobOutcome, PackedPicture
from app.engine.packing import Packing
from app.errors import IdempotencyError, InternalError, NotFoundError, QueueFullError
from app.jobs.database import Database, SchemaError
from app.jobs.files import is_job_id, new_job_id
from app.jobs.records import JobStatus, NewJob, StoredRequest
from app.jobs.schema import DATABASE_FILE, SCHEMA, open_database
from app.jobs.store import JobStore, Limits
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S
from tests.service.fake_pipeline import FakeResolved
from tests.service.processes import ROOT, environment

LIMITS = Limits(jobs=5, input_bytes=1000)


def new_job(**given: Any) -> NewJob:
    params = GenerationParams(prompt="a fox", width=64, height=96, seed=7)
    job = NewJob(
        id=new_job_id(),
        client="local",
        request_id="req_1",
        priority="normal",
        created_s=1000.0,
        deadline_s=None,
        request=StoredRequest.of(params, Packing("jpeg", 80), previews=2, warnings=("w",)),
    )
    return replace(job, **given)


def outcome(size: int = 10) -> JobOutcome:
    return JobOutcome(
        model="tiny",
        pictures=(PackedPicture(b"x" * size, "png", 7, 64, 96),),
        resolved=FakeResolved(64, 96, 4, None),
        timings_ms={"total": 12.34567},
        cache_hit=True,
        warnings=("cut",),
        peak_bytes=1,
        prompt_tokens=3,
    )


@contextmanager
def opened(directory: Path, limits: Limits = LIMITS) -> Iterator[JobStore]:
    database = open_database(directory)
    try:
        yield JobStore(database, limits)
    finally:
        database.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with opened(tmp_path) as made:
        yield made


def add(store: JobStore, **given: Any) -> str:
    job = new_job(**given)
    assert not store.add(job).result().is_repeat
    return job.id


def status(store: JobStore, job_id: str) -> JobStatus:
    return store.get(job_id).result().status


def test_a_record_holds_the_whole_request(store: JobStore) -> None:
    job = new_job(deadline_s=2000.0, webhook="https://example.org/done", input_bytes=3)
    accepted = store.add(job).result().record
    read = store.get(job.id).result()
    assert read == accepted
    assert read.status is JobStatus.QUEUED and read.attempts == 0
    assert read.request == job.request
    assert read.request.generation() == GenerationParams(
        prompt="a fox", width=64, height=96, seed=7
    )
    assert read.request.packing() == Packing("jpeg", 80)
    assert (read.deadline_s, read.webhook, read.input_bytes) == (2000.0, job.webhook, 3)


def test_a_completed_job_tells_all_but_the_bytes(store: JobStore) -> None:
    job_id = add(store)
    assert store.start(job_id).result()
    assert status(store, job_id) is JobStatus.RUNNING
    assert store.complete(job_id, outcome(10)).result()
    done = store.get(job_id).result()
    assert done.status is JobStatus.COMPLETED
    assert done.attempts == 1 and 10 < done.kept_bytes < 10_000
    assert done.started_s is not None and done.finished_s is not None
    assert done.outcome is not None
    assert done.outcome["pictures"] == [
        {"seed": 7, "width": 64, "height": 96, "format": "png", "bytes": 10}
    ]
    assert done.outcome["timings_ms"] == {"total": 12.346}
    assert done.outcome["warnings"] == ["cut"] and done.outcome["cache_hit"] is True


def test_a_failed_job_tells_what_a_client_may_know(store: JobStore) -> None:
    job_id = add(store)
    assert store.fail(job_id, InternalError("no luck", code="device_fault")).result()
    assert store.get(job_id).result().error == {
        "message": "no luck",
        "type": "server_error",
        "param": None,
        "code": "device_fault",
    }


@given(changes=st.lists(st.sampled_from(["start", "requeue", "complete", "fail", "cancel"])))
def test_a_final_status_is_the_first_and_only_one(
    changes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with opened(tmp_path_factory.mktemp("store")) as store:
        job_id = add(store)
        expected = JobStatus.QUEUED
        for change in changes:
            asked = {
                "start": lambda: store.start(job_id),
                "requeue": lambda: store.requeue(job_id),
                "complete": lambda: store.complete(job_id, outcome()),
                "fail": lambda: store.fail(job_id, InternalError("no")),
                "cancel": lambda: store.cancel(job_id),
            }[change]()
            assert asked.result() is not expected.is_final
            if not expected.is_final:
                expected = {
                    "start": JobStatus.RUNNING,
                    "requeue": JobStatus.QUEUED,
                    "complete": JobStatus.COMPLETED,
                    "fail": JobStatus.FAILED,
                    "cancel": JobStatus.CANCELLED,
                }[change]
            assert status(store, job_id) is expected
        waiting = [record.id for record in store.recover().result()]
        assert waiting == ([] if expected.is_final else [job_id])


def test_what_is_not_finished_is_listed_in_the_order_of_acceptance(store: JobStore) -> None:
    ids = [add(store) for _ in range(4)]
    store.start(ids[2]).result()
    store.cancel(ids[1]).result()
    assert [record.id for record in store.recover().result()] == [ids[0], ids[2], ids[3]]
    assert store.ids().result() == set(ids)


def test_pages_follow_one_another_and_hold_one_clients_jobs(tmp_path: Path) -> None:
    with opened(tmp_path, replace(LIMITS, jobs=100)) as store:
        check_pages(store)


def check_pages(store: JobStore) -> None:
    mine = [add(store, client="a") for _ in range(5)]
    theirs = add(store, client="b")
    first, more = store.page("a", 2).result()
    assert [record.id for record in first] == [mine[4], mine[3]] and more
    # A job that comes between two pages moves nothing.
    add(store, client="a")
    second, more = store.page("a", 3, after=mine[3]).result()
    assert [record.id for record in second] == [mine[2], mine[1], mine[0]] and not more
    store.cancel(mine[1]).result()
    cancelled, _ = store.page("a", 9, status=JobStatus.CANCELLED).result()
    assert [record.id for record in cancelled] == [mine[1]]
    assert [record.id for record in store.page("b", 9).result()[0]] == [theirs]
    with pytest.raises(NotFoundError):
        store.page("a", 2, after=new_job_id()).result()


def test_too_many_waiting_jobs_or_bytes_are_refused(store: JobStore) -> None:
    ids = [add(store) for _ in range(LIMITS.jobs)]
    with pytest.raises(QueueFullError, match="5 accepted jobs"):
        store.add(new_job()).result()
    with pytest.raises(QueueFullError):
        store.check_limits().result()
    store.cancel(ids[0]).result()
    store.check_limits().result()
    store.cancel(ids[1]).result()
    heavy = add(store, input_bytes=900)
    with pytest.raises(QueueFullError, match="900 bytes") as refused:
        store.add(new_job(input_bytes=101)).result()
    assert int(refused.value.headers["Retry-After"]) >= 1
    store.complete(heavy, outcome()).result()
    add(store, input_bytes=1000)


def test_a_key_stands_for_one_request_of_one_client(store: JobStore) -> None:
    first = add(store, idempotency_key="k", fingerprint="f")
    repeat = store.add(new_job(idempotency_key="k", fingerprint="f")).result()
    assert repeat.is_repeat and repeat.record.id == first
    found = store.find_repeat("local", "k", "f").result()
    assert found is not None and found.id == first
    for ask in (
        store.add(new_job(idempotency_key="k", fingerprint="g")),
        store.find_repeat("local", "k", "g"),
    ):
        with pytest.raises(IdempotencyError, match="another request"):
            ask.result()
    add(store, idempotency_key="k", fingerprint="g", client="other")
    assert store.find_repeat("local", "l", "f").result() is None
    # Also when no more jobs would be taken.
    for _ in range(LIMITS.jobs - 2):
        add(store)
    assert store.add(new_job(idempotency_key="k", fingerprint="f")).result().is_repeat


def test_old_jobs_and_the_oldest_of_too_many_bytes_are_removed(store: JobStore) -> None:
    ids = [add(store) for _ in range(4)]
    for job_id in ids[:3]:
        store.complete(job_id, outcome(100)).result()
    size = store.get(ids[0]).result().kept_bytes
    assert size > 100
    assert store.outlived(60.0, 3 * size).result() == []
    assert store.outlived(60.0, 3 * size - 1).result() == [ids[0]]
    assert set(store.outlived(60.0, size).result()) == {ids[0], ids[1]}
    assert set(store.outlived(0.0, 3 * size).result()) == set(ids[:3])
    assert store.remove(ids[0]).result()
    assert not store.remove(ids[0]).result()
    # What is not finished stays.
    assert not store.remove(ids[3]).result()
    with pytest.raises(NotFoundError):
        store.get(ids[0]).result()


def test_a_failing_change_leaves_nothing_behind(tmp_path: Path) -> None:
    database = Database(tmp_path / "x.sqlite3", ["CREATE TABLE t (n INTEGER)"])

    def half_done(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1)")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        database.write(half_done).result()
    database.write(lambda c: c.execute("INSERT INTO t VALUES (2)")).result()
    found = database.read(lambda c: [n for (n,) in c.execute("SELECT n FROM t")]).result()
    assert found == [2]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        database.read(lambda c: c.execute("DELETE FROM t")).result()
    database.close()


def test_a_database_of_an_earlier_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite3"
    first = Database(path, ["CREATE TABLE t (n INTEGER)"])
    first.write(lambda c: c.execute("INSERT INTO t VALUES (1)")).result()
    first.close()
    second = Database(path, ["CREATE TABLE t (n INTEGER)", "ALTER TABLE t ADD m TEXT DEFAULT 'x'"])
    rows = second.read(lambda c: [tuple(row) for row in c.execute("SELECT * FROM t")]).result()
    assert rows == [(1, "x")]
    second.close()


def test_a_database_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Database(tmp_path / DATABASE_FILE, [*SCHEMA, "SELECT 1"]).close()
    with pytest.raises(SchemaError, match="later version"):
        open_database(tmp_path)


def test_a_damaged_database_is_told_when_it_is_opened(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        add(store)
    path = tmp_path / DATABASE_FILE
    pages, size = bytearray(path.read_bytes()), 4096
    # All but the one that says what tables there are.
    for place in range(size, len(pages), size):
        pages[place : place + 100] = b"\xaa" * 100
    path.write_bytes(pages)
    with pytest.raises(sqlite3.DatabaseError, match="damaged"):
        open_database(tmp_path)


def test_its_files_are_private(store: JobStore, tmp_path: Path) -> None:
    add(store)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) >= 2 and set(modes.values()) == {0o600}, modes


KILLED_WRITER = """
import sys
from pathlib import Path
from app.jobs.schema import open_database
from app.jobs.store import JobStore, Limits
from tests.service.test_job_store import new_job

store = JobStore(open_database(Path(sys.argv[1])), Limits(10**6, 0))
while True:
    job = new_job()
    store.add(job).result()
    print(job.id, flush=True)
"""


def test_what_was_accepted_is_there_after_a_kill(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    told = [writer.stdout.readline().strip() for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    told += writer.stdout.read().split("\n")
    writer.wait(PATIENCE_S)
    writer.stdout.close()
    with opened(tmp_path) as store:
        kept = [record.id for record in store.recover().result()]
    assert all(is_job_id(job_id) for job_id in kept)
    assert set(told) - {""} <= set(kept) and len(kept) >= 20
