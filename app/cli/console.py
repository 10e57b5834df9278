"""What a person at a terminal is told: lines and a bar on standard error.

Standard output stays free for what was asked for. Without a terminal no bar is
drawn, so that logs and pipes hold plain lines only.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID
    from rich.text import Text

# Called with (done, total, what is being done).
Report = Callable[[int, int, str], None]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# Below, an estimate from what is done so far is worth nothing.
LEAST_SHARE = 0.02


class UsageError(Exception):
    """The command cannot work as it was given; the message says what to change."""


def say(message: str) -> None:
    """One line for the person, on standard error."""
    print(message, file=sys.stderr, flush=True)


class Bar:
    """One line: what is being done, how far it is, and how long it will take.

    Args:
        progress: draws it; None draws nothing.
        lock: held while the bar goes: a log line amid that would be taken for it.
    """

    def __init__(
        self, progress: Progress | None, lock: AbstractContextManager[object] | None = None
    ) -> None:
        self._progress = progress
        self._lock = lock or nullcontext()
        self._task: TaskID | None = None
        # The stage in hand, and whether its end is unknown.
        self._kind: tuple[str, bool] | None = None
        self._began_s = 0.0

    def show(
        self, stage: str, share: float | None = None, left_s: float | None = None, note: str = ""
    ) -> None:
        """Tell where things stand.

        Args:
            stage: what is being done.
            share: how much of it is done, 0 to 1; None where that is unknown.
            left_s: what it will still take; estimated from the share when left out.
            note: how far, in words.
        """
        if self._progress is None:
            return
        now_s = time.monotonic()
        kind = (stage, share is None)
        is_new = kind != self._kind
        if is_new:
            # A task cannot lose its total again.
            if self._task is not None:
                self._progress.remove_task(self._task)
            total = None if share is None else 1.0
            self._task = self._progress.add_task(stage, total=total, done_s=None)
            self._kind, self._began_s = kind, now_s
        assert self._task is not None, "the first kind of all is a new one"
        if left_s is None and share is not None and share >= LEAST_SHARE:
            left_s = (now_s - self._began_s) * (1 - share) / share
        self._progress.update(
            self._task,
            description=f"{stage} {note}".rstrip(),
            completed=share or 0.0,
            done_s=None if left_s is None else now_s + left_s,
            # A stage is seen, however short it is.
            refresh=is_new,
        )

    def end(self) -> None:
        """Take the bar away for good."""
        if self._progress is not None:
            with self._lock:
                self._progress.stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is written."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A bar that is gone afterwards; where there is no terminal, one that shows nothing."""
    if not sys.stderr.isatty():
        yield Bar(None)
        return
    with _progress() as progress:
        yield Bar(progress)


@contextmanager
def byte_progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes done and wanted."""
    with progress_bar() as bar:
        yield lambda done, total: bar.show(verb, done / max(total, 1), note=bytes_note(done, total))


@contextmanager
def load_progress() -> Iterator[Report]:
    """A bar of bytes for each part of something that is loaded."""
    with progress_bar() as bar:
        yield lambda done, total, what: bar.show(
            f"loading {what}", done / max(total, 1), note=bytes_note(done, total)
        )


@contextmanager
def step_progress() -> Iterator[Report]:
    """A bar of steps."""
    with progress_bar() as bar:
        yield lambda done, total, what: bar.show(
            what, done / max(total, 1), note=f"{done} of {total}"
        )


@contextmanager
def bar_and_log() -> Iterator[tuple[Bar, TextIO]]:
    """A bar, and a stream whose lines stand above it."""
    # Reentrant: a signal may come, and be logged, while a line is written.
    lock = threading.RLock()
    with _progress() as progress:
        bar = Bar(progress, lock)
        try:
            yield bar, _AboveBar(progress, lock)
        finally:
            bar.end()


def bytes_note(done: int, total: int) -> str:
    """How many bytes of how many, in one unit."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min((max(total, 1).bit_length() - 1) // 10, len(units) - 1)
    scale = 1024.0**power
    return f"{done / scale:.1f} of {total / scale:.1f} {units[power]}"


def duration(seconds: float) -> str:
    """Time in the unit that a person would use."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class _AboveBar(io.StringIO):
    """A stream for the log while a bar stands on the terminal; it holds nothing itself."""

    def __init__(self, progress: Progress, lock: AbstractContextManager[object]) -> None:
        super().__init__()
        self._lock = lock
        self._console = progress.console

    def isatty(self) -> bool:
        """As the terminal that it writes to."""
        return True

    def write(self, text: str) -> int:
        """Above the bar."""
        with self._lock:
            self._console.out(text, end="", highlight=False)
        return len(text)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class Share(ProgressColumn):
        """How much is done, where that is known."""

        def render(self, task: Task) -> Text:
            return Text("" if task.total is None else f"{task.percentage:3.0f} %")

    class Left(ProgressColumn):
        """Time left, counted down between two reports; else time taken."""

        def render(self, task: Task) -> Text:
            done_s = task.fields["done_s"]
            if done_s is None:
                return Text(duration(task.elapsed or 0.0))
            return Text(f"{duration(max(0.0, done_s - time.monotonic()))} left")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        Share(),
        Left(),
        console=Console(stderr=True),
        transient=True,
    )
