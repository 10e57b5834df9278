"""The settings' data directory, opened: all that is kept, and what runs the jobs."""

from __future__ import annotations

import logging
import sqlite3
from dataclasses import dataclass

from app.engine import Engine
from app.jobs.answers import KeptAnswers
from app.jobs.database import Database, SchemaError
from app.jobs.files import DataDirectoryError, JobFiles
from app.jobs.retention import Retention
from app.jobs.runner import JobRunner
from app.jobs.schema import open_database
from app.jobs.store import JobStore, Limits
from app.jobs.webhooks import Webhooks
from app.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

# Kept jobs that the engine has at a time: enough to run those of one shape as a batch.
MOST_IN_ENGINE = 8


@dataclass
class Kept:
    """What outlives the process. ``start`` and ``close`` block."""

    files: JobFiles
    database: Database
    jobs: JobRunner
    answers: KeptAnswers
    webhooks: Webhooks
    is_closed: bool = False

    def start(self) -> None:
        """Take up what an earlier process left."""
        logger.info("accepted jobs are kept in %s", self.files.root)
        self.answers.start()
        self.jobs.start()
        self.webhooks.start()

    def close(self) -> None:
        """End, once the engine has. A second call does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        self.jobs.close()
        self.webhooks.close()
        self.database.close()
        self.files.close()


def open_kept(settings: Settings, engine: Engine) -> Kept | None:
    """What is kept, not started; None where the settings say off.

    Raises:
        SettingsError: the data directory cannot be used.
    """
    directory = settings.data_path
    if directory is None:
        return None
    try:
        files = JobFiles(directory)
        try:
            database = open_database(directory)
        except BaseException:
            files.close()
            raise
    except (DataDirectoryError, SchemaError, sqlite3.Error, OSError) as error:
        raise SettingsError(
            f"data_dir {directory}: {error}; name another one with --set data_dir=DIR, "
            "or keep nothing with --set data_dir=off"
        ) from None
    try:
        webhooks = Webhooks(database, settings)
    except SettingsError:
        database.close()
        files.close()
        raise
    most_bytes = settings.job_storage_bytes
    jobs = JobRunner(
        engine,
        JobStore(database, Limits(settings.job_limit, most_bytes)),
        files,
        Retention(settings.job_retention_s, most_bytes),
        most_in_engine=MOST_IN_ENGINE,
        on_end=webhooks.wake,
    )
    answers = KeptAnswers(database, files, Retention(settings.idempotency_retention_s, most_bytes))
    return Kept(files, database, jobs, answers, webhooks)
