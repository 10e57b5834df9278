"""First answers to requests that carry an Idempotency-Key, kept for those that repeat them.

Owns for how long and how many. Everything here blocks: call it on a thread.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from dataclasses import dataclass

from app.errors import IdempotencyError
from app.jobs.database import Database
from app.jobs.files import JobFiles
from app.jobs.retention import Retention, SweepBudget

# What an answer's record takes beside its body, about.
RECORD_BYTES = 2048


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer as it went out first."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Which request a key stands for. ``fingerprint`` tells it from any other request."""

    client: str
    key: str
    fingerprint: str

    def check(self, fingerprint: str) -> None:
        """Compare with the request that the key was given with first.

        Raises:
            IdempotencyError: that was another one.
        """
        if self.fingerprint != fingerprint:
            raise IdempotencyError(
                "this Idempotency-Key was given with another request before; "
                "use a new key for a new request"
            )


class KeptAnswers:
    """See the module."""

    def __init__(self, database: Database, files: JobFiles, retention: Retention) -> None:
        self._database = database
        self._files = files
        self._retention = retention
        self._budget = SweepBudget(retention.most_bytes)
        self._lock = threading.Lock()

    def start(self) -> None:
        """Remove what is too old, and what a crash left behind."""
        self._remove_outlived()
        rows = self._database.read(lambda c: c.execute("SELECT id FROM answers").fetchall())
        self._files.sweep_answers(row["id"] for row in rows.result())

    def find(self, request: RequestKey) -> KeptAnswer | None:
        """The first answer to the request, if there was one.

        Raises:
            IdempotencyError: the key stands for another request.
            sqlite3.Error, OSError: the disk does not give it.
        """

        def query(connection: sqlite3.Connection) -> sqlite3.Row | None:
            found: sqlite3.Row | None = connection.execute(
                "SELECT * FROM answers WHERE client = ? AND idempotency_key = ? AND created_s > ?",
                (request.client, request.key, time.time() - self._retention.seconds),
            ).fetchone()
            return found

        row = self._database.read(query).result()
        if row is None:
            return None
        request.check(row["fingerprint"])
        headers = tuple((name, value) for name, value in json.loads(row["headers"]))
        try:
            body = self._files.read_answer(row["id"])
        except FileNotFoundError:
            # Removed for its age between the two reads.
            return None
        return KeptAnswer(row["status"], headers, body)

    def keep(self, request: RequestKey, answer: KeptAnswer) -> None:
        """Keep a first answer.

        Raises:
            sqlite3.Error, OSError: the disk does not take it.
        """
        kept_bytes = len(answer.body) + RECORD_BYTES
        answer_id = f"answer_{secrets.token_hex(16)}"
        self._files.write_answer(answer_id, answer.body)

        def change(connection: sqlite3.Connection) -> None:
            # What may stand there has outlived its time: else it would have been found.
            connection.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    request.client,
                    request.key,
                    request.fingerprint,
                    answer_id,
                    time.time(),
                    answer.status,
                    json.dumps(answer.headers),
                    kept_bytes,
                ),
            )

        with self._lock:
            is_spent = self._budget.is_spent(kept_bytes)
        if is_spent:
            self._remove_outlived()
        self._database.write(change).result()

    def _remove_outlived(self) -> None:
        oldest_s = time.time() - self._retention.seconds

        def change(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                "DELETE FROM answers WHERE id IN (SELECT id FROM (SELECT id, created_s,"
                " SUM(kept_bytes) OVER (ORDER BY created_s DESC, id) AS newer_bytes FROM answers)"
                " WHERE created_s <= ? OR newer_bytes > ?) RETURNING id",
                (oldest_s, self._retention.most_bytes),
            ).fetchall()
            return [row["id"] for row in rows]

        for answer_id in self._database.write(change).result():
            self._files.remove_answer(answer_id)
