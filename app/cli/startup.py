"""How ``fluxd serve`` gets ready, on a terminal: a bar below its log lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from app.cli.console import Bar, bar_and_log
from app.engine import Engine, EngineStatus

POLL_S = 0.1


class StartupWatch:
    """Follows an engine until it is ready, or will never be.

    Attributes:
        log: where log lines go meanwhile and afterwards.
    """

    def __init__(self, bar: Bar, log: TextIO) -> None:
        self.log = log
        self._bar = bar

    def follow(self, engine: Engine) -> None:
        """Watch an engine that has been made; returns at once."""
        threading.Thread(target=self._run, args=(engine,), name="startup", daemon=True).start()

    def _run(self, engine: Engine) -> None:
        while (status := engine.status()).state in ("loading", "warming_up"):
            self._bar.show(*stage_of(status))
            time.sleep(POLL_S)
        self._bar.end()


def stage_of(status: EngineStatus) -> tuple[str, float | None]:
    """What an engine does until it is ready, and how much of that is done, if that is known."""
    startup = status.startup
    if status.state == "warming_up":
        is_compiling = status.device.get("compiled") == "yes"
        words = "compiling (it can take minutes)" if is_compiling else "warming up"
        # Of one picture, which is the rule, there is no half.
        return words, (startup.progress or None) if startup.stage == "warm-up" else None
    if startup.stage == "starting":
        return "starting", None
    return f"loading {startup.stage}", startup.progress


@contextmanager
def startup_watch() -> Iterator[StartupWatch | None]:
    """A watch over the start of a service; None where no terminal is attached."""
    if not sys.stderr.isatty():
        yield None
        return
    with bar_and_log() as (bar, log):
        yield StartupWatch(bar, log)
