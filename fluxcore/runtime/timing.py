"""Stage times that wait for the device, so that a stage owns what it started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageTimes:
    """Adds up milliseconds per stage.

    Args:
        synchronize: waits until the device has finished what was queued.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._started = time.perf_counter()
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, waits: bool = True) -> Iterator[None]:
        """Measure one span of work, which may be one of several of its stage.

        Args:
            waits: for the device; otherwise whoever does the work waits for what it needs.
        """
        started = time.perf_counter()
        yield
        if waits:
            self._synchronize()
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, spent_s: float) -> None:
        """A span that was measured elsewhere."""
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent_s * 1000

    def total(self) -> float:
        """Milliseconds of all stages together; gaps between them are not the device's."""
        return sum(self.milliseconds.values())
