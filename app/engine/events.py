"""What a watcher of a job sees, in order, and who is watching.

Owns the promise that every watcher sees one sane sequence, whenever it comes:
``Queued`` (again as the place changes), ``Started``, then ``StepDone`` and ``Preview``,
and ``Settled`` last, after which the job's future has its answer. Knows nothing of
how events reach a client.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.engine.packing import PackedPicture

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits.

    Attributes:
        position: 1 for the job that is to be started next.
        eta_s: when it should be started, in seconds from now; None if that is unknown.
    """

    position: int
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """The first slice of the job is about to run."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """One Euler step is done.

    Attributes:
        image_index: which of the job's pictures, from 0.
        step, steps: done and wanted, of this picture.
        of_all: done so far of all the job's pictures, which may be drawn side by side.
        eta_s: when the whole job should be done, in seconds from now; None if unknown, or if
            nobody was watching.
    """

    image_index: int
    step: int
    steps: int
    of_all: int
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class Preview:
    """What the model saw coming after a step: a picture of the final size."""

    image_index: int
    step: int
    picture: PackedPicture


@dataclass(frozen=True, slots=True)
class Settled:
    """The job's future has the outcome or the error. Nothing comes after it."""


JobEvent = Queued | Started | StepDone | Preview | Settled
Listener = Callable[[JobEvent], None]


class EventLog:
    """The events of one job: the ones that still hold, and who hears the next.

    Listeners are called one event at a time, from whichever thread has news, and must
    not block.
    """

    def __init__(self) -> None:
        # Reentrant, so that a listener may stop watching.
        self._lock = threading.RLock()
        self._listeners: dict[object, Listener] = {}
        # The latest of each kind that still holds, in the order in which to repeat them.
        self._current: dict[type[JobEvent], JobEvent] = {}

    @property
    def is_watched(self) -> bool:
        """Whether anybody hears the next event."""
        return bool(self._listeners)

    def emit(self, event: JobEvent) -> None:
        """Tell all listeners; an event that comes after its time is dropped."""
        with self._lock:
            if Settled in self._current:
                return
            if isinstance(event, Queued) and Started in self._current:
                return
            if isinstance(event, (Queued, Started, Settled)):
                self._current.clear()
            self._current[type(event)] = event
            for key, listener in list(self._listeners.items()):
                self._tell(key, listener, event)
            if isinstance(event, Settled):
                self._listeners.clear()

    def watch(
        self, listener: Listener, place: Queued | None = None, eta_s: float | None = None
    ) -> Callable[[], None]:
        """Repeat what holds now to ``listener``, then tell it what comes.

        Args:
            place: the job's present place, newer than the one that was last told.
            eta_s: when the job should be done, newer than what was last told.

        Returns:
            A function that ends the watching; it may be called more than once.
        """
        key = object()

        def stop() -> None:
            with self._lock:
                self._listeners.pop(key, None)

        with self._lock:
            if place is not None and not self._current.keys() & {Started, Settled}:
                self._current[Queued] = place
            step = self._current.get(StepDone)
            if isinstance(step, StepDone) and eta_s is not None:
                self._current[StepDone] = replace(step, eta_s=eta_s)
            if Settled not in self._current:
                self._listeners[key] = listener
            for event in list(self._current.values()):
                self._tell(key, listener, event)
        return stop

    def _tell(self, key: object, listener: Listener, event: JobEvent) -> None:
        try:
            listener(event)
        except Exception:
            # A watcher's fault must not end the job, nor the worker that runs it.
            logger.exception("a watcher of the job failed and is not told any more")
            self._listeners.pop(key, None)
