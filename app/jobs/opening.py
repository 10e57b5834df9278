"""The settings' data directory, opened: the store, the files and what runs the jobs."""

from __future__ import annotations

import sqlite3

from app.engine import Engine
from app.jobs.database import SchemaError
from app.jobs.files import DataDirectoryError, JobFiles
from app.jobs.runner import JobRunner, Retention
from app.jobs.store import JobStore, Limits
from app.settings import Settings, SettingsError

# Kept jobs that the engine has at a time: enough to run those of one shape as a batch.
MOST_IN_ENGINE = 8


def open_jobs(settings: Settings, engine: Engine) -> JobRunner | None:
    """What keeps and runs accepted jobs, not started; None where the settings say off.

    Raises:
        SettingsError: the data directory cannot be used.
    """
    directory = settings.data_path
    if directory is None:
        return None
    try:
        files = JobFiles(directory)
        try:
            store = JobStore(directory, Limits(settings.job_limit, settings.job_storage_bytes))
        except BaseException:
            files.close()
            raise
    except (DataDirectoryError, SchemaError, sqlite3.Error, OSError) as error:
        raise SettingsError(
            f"data_dir {directory}: {error}; name another one with --set data_dir=DIR, "
            "or keep no jobs with --set data_dir=off"
        ) from None
    retention = Retention(settings.job_retention_s, settings.job_storage_bytes)
    return JobRunner(engine, store, files, retention, most_in_engine=MOST_IN_ENGINE)
