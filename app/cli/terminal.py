"""What a person at a terminal sees: progress bars on standard error, or nothing.

Standard output stays free for what was asked for. Without a terminal no bar is
drawn, so that logs and pipes hold plain lines only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

# Called with (done, total, what is being done).
Report = Callable[[int, int, str], None]


class UsageError(Exception):
    """The command cannot work as it was given; the message says what to change."""


def say(message: str) -> None:
    """One line for the person, on standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def byte_progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes done and wanted."""
    with _bar(is_bytes=True) as report:
        yield lambda done, total: report(done, total, verb)


@contextmanager
def load_progress() -> Iterator[Report]:
    """A bar of bytes for each part of something that is loaded."""
    with _bar(is_bytes=True) as report:
        yield report


@contextmanager
def step_progress() -> Iterator[Report]:
    """A bar of steps."""
    with _bar(is_bytes=False) as report:
        yield report


@contextmanager
def _bar(*, is_bytes: bool) -> Iterator[Report]:
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    with _progress(is_bytes=is_bytes) as progress:
        task = progress.add_task("", total=None)

        def report(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield report


def _progress(*, is_bytes: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if is_bytes else MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
