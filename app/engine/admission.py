"""Whether one more job may wait, and when it is worth asking again.

Owns the bounds and the promises given to those who were refused. Knows nothing of
who runs next; it is told the order that is foreseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import QueueFullError

# Clients do not honour longer waits (the OpenAI SDKs ignore more than 120 s).
LONGEST_WAIT_S = 120.0
# How long after its time a refused client is still expected back.
PROMISE_KEPT_S = 3.0
# One more place for every so many, open to clients of whom nothing waits yet.
PLACES_PER_NEWCOMER = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait and run at most.

    Attributes:
        jobs: jobs that wait.
        pixels: of the pictures that waiting jobs draw and hold.
        work_s: estimated seconds of all that waits and runs.
        in_flight: jobs that have begun and not been answered.
    """

    jobs: int = 32
    pixels: int = 256_000_000
    work_s: float = 600.0
    in_flight: int = 8


class Load(NamedTuple):
    """What one job puts on the queue. ``is_waiting``: it has not begun."""

    work_s: float
    pixels: int
    is_waiting: bool = True


class _Promise(NamedTuple):
    due_s: float
    load: Load


class Admission:
    """Keeps the bounds. Call it under the scheduler's lock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._promises: list[_Promise] = []

    def check(self, wanted: Load, foreseen: Sequence[Load], own_waiting: int, now_s: float) -> None:
        """Take note of one more job, or refuse it.

        Args:
            foreseen: all that waits and runs, in the order in which it should be done.
            own_waiting: waiting jobs of the same client.

        Raises:
            QueueFullError: with the time after which it should be let in.
        """
        waiting = [load for load in foreseen if load.is_waiting]
        limits = self._limits
        places = limits.jobs
        if own_waiting == 0:
            places += max(1, limits.jobs // PLACES_PER_NEWCOMER)
        pixels = sum(load.pixels for load in waiting) + wanted.pixels
        work_s = sum(load.work_s for load in foreseen) + wanted.work_s
        if len(waiting) >= places:
            bound, what = "jobs", f"{len(waiting)} jobs wait"
        elif waiting and pixels > limits.pixels:
            bound, what = "pixels", f"waiting jobs would hold {pixels} pixels"
        elif foreseen and work_s > limits.work_s:
            bound, what = "work", f"there is work for about {work_s:.0f} s"
        else:
            return
        self._forget_old(now_s)
        wait_s = min(self._free_in_s(wanted, foreseen), LONGEST_WAIT_S)
        # Before its pictures are decoded, a job's size is not known.
        load = wanted if wanted.work_s else Load(_mean_work_s(foreseen), wanted.pixels)
        self._promises.append(_Promise(now_s + wait_s, load))
        raise QueueFullError(
            f"the queue is full: {what}; try again later", bound=bound, retry_after_s=wait_s
        )

    def admitted(self, now_s: float) -> None:
        """Somebody was let in: one of those who were to come about now, if there is one."""
        self._forget_old(now_s)
        due = min(self._promises, key=lambda promise: promise.due_s, default=None)
        if due is not None and due.due_s <= now_s + PROMISE_KEPT_S:
            self._promises.remove(due)

    def _free_in_s(self, wanted: Load, foreseen: Sequence[Load]) -> float:
        """When there is room, those who were refused before having come back first."""
        promised = [promise.load for promise in self._promises]
        limits, loads = self._limits, [*foreseen, *promised]
        waiting = [load for load in loads if load.is_waiting]
        places = limits.jobs - len(waiting)
        pixels = limits.pixels - sum(load.pixels for load in waiting) - wanted.pixels
        work_s = sum(load.work_s for load in loads) + wanted.work_s - limits.work_s
        elapsed_s = 0.0
        for load in loads:
            if load.is_waiting:
                # It begins, and leaves its place.
                places, pixels = places + 1, pixels + load.pixels
                if places > 0 and pixels >= 0:
                    break
            elapsed_s += load.work_s
        return max(elapsed_s, work_s, 0.0)

    def _forget_old(self, now_s: float) -> None:
        self._promises = [p for p in self._promises if p.due_s + PROMISE_KEPT_S > now_s]


def _mean_work_s(loads: Sequence[Load]) -> float:
    return sum(load.work_s for load in loads) / len(loads) if loads else 0.0
