"""The records of accepted jobs, as questions and changes that each happen at once.

Owns the rules of a job's status: it becomes final once, which its webhook is told of,
and never changes again. Every method returns a future and none of them blocks.
"""

from __future__ import annotations

import json
import sqlite3
import time
from concurrent.futures import Future
from dataclasses import dataclass

from app.engine import JobOutcome
from app.errors import (
    IdempotencyError,
    NotFoundError,
    QueueFullError,
    ServiceError,
)
from app.jobs.database import Database
from app.jobs.records import (
    JobRecord,
    JobStatus,
    NewJob,
    StoredRequest,
    error_json,
    new_delivery_id,
    outcome_json,
    webhook_body,
)

# How many finished jobs tell how fast jobs are finished.
RATE_JOBS = 20
# When a client may ask again while that is unknown, in seconds, and at most.
FIRST_RETRY_S = 30.0
LONGEST_RETRY_S = 120.0

# What a record takes beside its request and its pictures, about.
RECORD_BYTES = 2048
# Above every job's number.
LAST_NUMBER = 2**63 - 1

_UNFINISHED = f"status IN ('{JobStatus.QUEUED}', '{JobStatus.RUNNING}')"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait: jobs, and bytes of their input pictures."""

    jobs: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that was accepted, now or by an earlier request with the same key."""

    record: JobRecord
    is_repeat: bool


class JobStore:
    """See the module.

    Args:
        limits: how much may wait.
    """

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits

    def add(self, job: NewJob) -> Future[Accepted]:
        """Accept a job; from then on it will be finished, whatever happens to the process.

        Raises (from the future):
            IdempotencyError: the key stands for another request.
            QueueFullError: too much waits already.
        """

        def change(connection: sqlite3.Connection) -> Accepted:
            known = _by_key(connection, job.client, job.idempotency_key, job.fingerprint)
            if known is not None:
                return Accepted(known, is_repeat=True)
            self._check_limits(connection, job.input_bytes)
            connection.execute(
                "INSERT INTO jobs (id, client, request_id, status, priority, created_s,"
                " deadline_s, request, webhook, input_bytes, idempotency_key, fingerprint)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job.id,
                    job.client,
                    job.request_id,
                    JobStatus.QUEUED,
                    job.priority,
                    job.created_s,
                    job.deadline_s,
                    job.request.to_json(),
                    job.webhook,
                    job.input_bytes,
                    job.idempotency_key,
                    job.fingerprint,
                ),
            )
            return Accepted(_by_id(connection, job.id), is_repeat=False)

        return self._database.write(change)

    def find_repeat(self, client: str, key: str, fingerprint: str) -> Future[JobRecord | None]:
        """The job that an earlier request with this key made.

        Raises (from the future):
            IdempotencyError: the key stands for another request.
        """
        return self._database.read(lambda c: _by_key(c, client, key, fingerprint))

    def check_limits(self) -> Future[None]:
        """Refuse before pictures are decoded.

        Raises (from the future):
            QueueFullError: too much waits already.
        """
        return self._database.read(lambda c: self._check_limits(c, 0))

    def get(self, job_id: str) -> Future[JobRecord]:
        """One job.

        Raises (from the future):
            NotFoundError: there is none, or no longer.
        """
        return self._database.read(lambda c: _by_id(c, job_id))

    def page(
        self, client: str, limit: int, *, after: str | None = None, status: JobStatus | None = None
    ) -> Future[tuple[list[JobRecord], bool]]:
        """A client's jobs, the newest first, and whether there are more.

        Args:
            after: the id of the last job of the page before.

        Raises (from the future):
            NotFoundError: the client has no job ``after``, or no longer.
        """

        def query(connection: sqlite3.Connection) -> tuple[list[JobRecord], bool]:
            before = LAST_NUMBER
            if after is not None:
                last = _by_id(connection, after)
                if last.client != client:
                    raise _no_job()
                before = last.number
            rows = connection.execute(
                "SELECT * FROM jobs WHERE client = :client AND number < :before"
                " AND (:status IS NULL OR status = :status) ORDER BY number DESC LIMIT :limit",
                {"client": client, "before": before, "status": status, "limit": limit + 1},
            ).fetchall()
            return [_record(row) for row in rows[:limit]], len(rows) > limit

        return self._database.read(query)

    def recover(self) -> Future[list[JobRecord]]:
        """What is still to be done, in the order of acceptance; nothing of it runs."""

        def change(connection: sqlite3.Connection) -> list[JobRecord]:
            connection.execute(
                "UPDATE jobs SET status = ?, started_s = NULL WHERE status = ?",
                (JobStatus.QUEUED, JobStatus.RUNNING),
            )
            rows = connection.execute(f"SELECT * FROM jobs WHERE {_UNFINISHED} ORDER BY number")
            return [_record(row) for row in rows]

        return self._database.write(change)

    def start(self, job_id: str) -> Future[bool]:
        """The job runs now. False when it is final already."""

        def change(connection: sqlite3.Connection) -> bool:
            done = connection.execute(
                "UPDATE jobs SET status = ?, started_s = ?, attempts = attempts + 1"
                f" WHERE id = ? AND {_UNFINISHED}",
                (JobStatus.RUNNING, time.time(), job_id),
            )
            return done.rowcount == 1

        return self._database.write(change)

    def requeue(self, job_id: str) -> Future[bool]:
        """The job was interrupted through no fault of its own. False when it is final."""

        def change(connection: sqlite3.Connection) -> bool:
            done = connection.execute(
                "UPDATE jobs SET status = ?, started_s = NULL, attempts = 0"
                f" WHERE id = ? AND {_UNFINISHED}",
                (JobStatus.QUEUED, job_id),
            )
            return done.rowcount == 1

        return self._database.write(change)

    def complete(self, job_id: str, outcome: JobOutcome) -> Future[bool]:
        """The job's pictures lie on the disk. False when it is final already."""
        size = sum(len(picture.data) for picture in outcome.pictures)
        text = outcome_json(outcome)
        return self._database.write(
            lambda c: _finish(c, job_id, JobStatus.COMPLETED, outcome=text, picture_bytes=size)
        )

    def fail(self, job_id: str, error: ServiceError) -> Future[bool]:
        """The job ended without pictures. False when it is final already."""
        text = error_json(error)
        return self._database.write(lambda c: _finish(c, job_id, JobStatus.FAILED, error=text))

    def cancel(self, job_id: str) -> Future[bool]:
        """The client no longer wants the job. False when it is final already, or unknown."""
        return self._database.write(lambda c: _finish(c, job_id, JobStatus.CANCELLED))

    def remove(self, job_id: str) -> Future[bool]:
        """Forget a job that is final. False when there is none such."""

        def change(connection: sqlite3.Connection) -> bool:
            done = connection.execute(
                f"DELETE FROM jobs WHERE id = ? AND NOT {_UNFINISHED}", (job_id,)
            )
            return done.rowcount == 1

        return self._database.write(change)

    def outlived(self, retention_s: float, most_bytes: int) -> Future[list[str]]:
        """Jobs to be removed: finished too long ago, or the oldest of too many bytes."""
        oldest_s = time.time() - retention_s

        def query(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                "SELECT id FROM (SELECT id, finished_s, SUM(kept_bytes) OVER"
                " (ORDER BY finished_s DESC, number DESC) AS newer_bytes FROM jobs"
                " WHERE finished_s IS NOT NULL) WHERE finished_s < ? OR newer_bytes > ?",
                (oldest_s, most_bytes),
            )
            return [row["id"] for row in rows]

        return self._database.read(query)

    def probe(self) -> Future[None]:
        """Change nothing; fails where no change could be begun."""
        return self._database.write(lambda _: None)

    def ids(self) -> Future[set[str]]:
        """Of all jobs there are."""
        return self._database.read(
            lambda c: {row["id"] for row in c.execute("SELECT id FROM jobs")}
        )

    def _check_limits(self, connection: sqlite3.Connection, input_bytes: int) -> None:
        row = connection.execute(
            "SELECT COUNT(*) AS jobs, COALESCE(SUM(input_bytes), 0) AS bytes FROM jobs"
            f" WHERE {_UNFINISHED}"
        ).fetchone()
        if row["jobs"] >= self._limits.jobs:
            raise QueueFullError(
                f"{row['jobs']} accepted jobs are not finished yet, as many as may be; "
                "try again later",
                retry_after_s=_interval_s(connection),
            )
        if row["bytes"] + input_bytes > self._limits.input_bytes:
            raise QueueFullError(
                f"the pictures of waiting jobs take {row['bytes']} bytes; "
                f"at most {self._limits.input_bytes} are kept; try again later",
                retry_after_s=_interval_s(connection),
            )


def _interval_s(connection: sqlite3.Connection) -> float:
    """The time from one finished job to the next, while jobs wait."""
    rows = connection.execute(
        "SELECT finished_s FROM jobs WHERE status = ? ORDER BY finished_s DESC LIMIT ?",
        (JobStatus.COMPLETED, RATE_JOBS),
    ).fetchall()
    if len(rows) < 2:
        return FIRST_RETRY_S
    spread_s: float = rows[0]["finished_s"] - rows[-1]["finished_s"]
    return min(spread_s / (len(rows) - 1), LONGEST_RETRY_S)


def _finish(
    connection: sqlite3.Connection,
    job_id: str,
    status: JobStatus,
    *,
    outcome: str | None = None,
    error: str | None = None,
    picture_bytes: int = 0,
) -> bool:
    done = connection.execute(
        "UPDATE jobs SET status = ?, finished_s = ?, outcome = ?, error = ?, input_bytes = 0,"
        " kept_bytes = ? + LENGTH(CAST(request AS BLOB))"
        f" WHERE id = ? AND {_UNFINISHED}",
        (status, time.time(), outcome, error, picture_bytes + RECORD_BYTES, job_id),
    )
    if done.rowcount != 1:
        return False
    record = _by_id(connection, job_id)
    if record.webhook is not None:
        connection.execute(
            "INSERT INTO deliveries (id, job_id, url, body, next_s) VALUES (?, ?, ?, ?, ?)",
            (new_delivery_id(), job_id, record.webhook, webhook_body(record), time.time()),
        )
    return True


def _by_id(connection: sqlite3.Connection, job_id: str) -> JobRecord:
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise _no_job()
    return _record(row)


def _no_job() -> NotFoundError:
    return NotFoundError("there is no such job, or no longer", code="job_not_found")


def _by_key(
    connection: sqlite3.Connection, client: str, key: str | None, fingerprint: str | None
) -> JobRecord | None:
    if key is None:
        return None
    row = connection.execute(
        "SELECT * FROM jobs WHERE client = ? AND idempotency_key = ?", (client, key)
    ).fetchone()
    if row is None:
        return None
    if row["fingerprint"] != fingerprint:
        raise IdempotencyError(
            "this Idempotency-Key stands for another request; use a new key for a new request"
        )
    return _record(row)


def _record(row: sqlite3.Row) -> JobRecord:
    return JobRecord(
        number=row["number"],
        id=row["id"],
        client=row["client"],
        request_id=row["request_id"],
        status=JobStatus(row["status"]),
        priority=row["priority"],
        created_s=row["created_s"],
        deadline_s=row["deadline_s"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        attempts=row["attempts"],
        request=StoredRequest.from_json(row["request"]),
        outcome=None if row["outcome"] is None else json.loads(row["outcome"]),
        error=None if row["error"] is None else json.loads(row["error"]),
        webhook=row["webhook"],
        input_bytes=row["input_bytes"],
        kept_bytes=row["kept_bytes"],
    )
