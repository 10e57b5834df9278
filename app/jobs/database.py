"""One SQLite file, one thread that writes to it and one that reads.

Owns the connections, their settings and the schema's version. What is asked comes
in as a function of a connection; the answer comes back as a future, so that no
caller waits for the disk unless it means to.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# How long a statement waits for another process that holds the file, in seconds.
BUSY_S = 10.0


class SchemaError(Exception):
    """The file was written by a later version of the program."""


class Database:
    """See the module.

    Args:
        path: the file; made when it is not there.
        schema: for each version, the statements that lead to it from the one before.

    Raises:
        SchemaError: the file's version is later than the last one of ``schema``.
        sqlite3.Error: it cannot be opened, is no database, or a damaged one.
    """

    def __init__(self, path: Path, schema: Sequence[str]) -> None:
        self._writing = _connect(path)
        try:
            # A reader sees the last commit while the next is being written.
            self._writing.execute("PRAGMA journal_mode = WAL")
            # A commit is on the disk before the client is told of it.
            self._writing.execute("PRAGMA synchronous = FULL")
            _check(self._writing)
            _migrate(self._writing, schema)
            self._reading = _connect(path)
            self._reading.execute("PRAGMA query_only = ON")
        except BaseException:
            self._writing.close()
            raise
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fluxd-db-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fluxd-db-read")

    def write(self, change: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Run a change as one transaction, after those asked for before."""

        def run() -> T:
            with _transaction(self._writing):
                return change(self._writing)

        return _submit(self._writer, run)

    def read(self, query: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Run a query on the last committed state."""

        def run() -> T:
            return query(self._reading)

        return _submit(self._reader, run)

    def close(self) -> None:
        """End after what has been asked for. Blocks."""
        self._reader.shutdown(wait=True)
        self._reading.close()
        self._writer.shutdown(wait=True)
        self._writing.close()


def _submit(pool: ThreadPoolExecutor, run: Callable[[], T]) -> Future[T]:
    try:
        return pool.submit(run)
    except RuntimeError:
        raise sqlite3.ProgrammingError("the database is closed") from None


def _connect(path: Path) -> sqlite3.Connection:
    # Each connection is made here and then used by one thread only.
    connection = sqlite3.connect(path, BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _check(connection: sqlite3.Connection) -> None:
    """Damage is told at the start, and not by whatever question meets it first."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"the database is damaged ({' '.join(found.split())})")


def _migrate(connection: sqlite3.Connection, schema: Sequence[str]) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(schema):
        raise SchemaError(
            f"written by a later version of fluxd (schema {version}, this one knows {len(schema)})"
        )
    for number, statements in enumerate(schema[version:], start=version + 1):
        with _transaction(connection):
            for statement in statements.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A failed COMMIT (a full disk) may have ended the transaction by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
