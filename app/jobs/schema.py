"""The tables of the data directory's database, and its opening."""

from __future__ import annotations

from pathlib import Path

from app.jobs.database import Database

DATABASE_FILE = "jobs.sqlite3"

# A released entry never changes; a new one is added after it.
SCHEMA = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        client TEXT NOT NULL,
        request_id TEXT NOT NULL,
        status TEXT NOT NULL,
        priority TEXT NOT NULL,
        created_s REAL NOT NULL,
        deadline_s REAL,
        started_s REAL,
        finished_s REAL,
        attempts INTEGER NOT NULL DEFAULT 0,
        webhook TEXT,
        input_bytes INTEGER NOT NULL,
        kept_bytes INTEGER NOT NULL DEFAULT 0,
        idempotency_key TEXT,
        fingerprint TEXT,
        request TEXT NOT NULL,
        outcome TEXT,
        error TEXT
    );
    CREATE INDEX jobs_by_client ON jobs (client, number);
    CREATE INDEX jobs_by_status ON jobs (status, number, input_bytes);
    CREATE INDEX jobs_by_end ON jobs (finished_s, number, kept_bytes, id)
        WHERE finished_s IS NOT NULL;
    CREATE UNIQUE INDEX jobs_by_key ON jobs (client, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
    CREATE TABLE answers (
        client TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        id TEXT NOT NULL UNIQUE,
        created_s REAL NOT NULL,
        status INTEGER NOT NULL,
        headers TEXT NOT NULL,
        kept_bytes INTEGER NOT NULL,
        PRIMARY KEY (client, idempotency_key)
    );
    CREATE INDEX answers_by_age ON answers (created_s, id, kept_bytes);
    CREATE TABLE deliveries (
        id TEXT PRIMARY KEY,
        job_id TEXT NOT NULL,
        url TEXT NOT NULL,
        body TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        next_s REAL NOT NULL
    )
    """,
)


def open_database(directory: Path) -> Database:
    """The database in a directory, which must exist.

    Raises:
        SchemaError, sqlite3.Error: it cannot be used.
    """
    path = directory / DATABASE_FILE
    # SQLite gives its other files the same mode: prompts are private.
    path.touch(mode=0o600)
    return Database(path, SCHEMA)
