"""Whether one more job may wait, and when it is worth asking again.

Owns the bounds and the promises given to those who were refused. Knows nothing of
who runs next; it is told the order that is foreseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.errors import QueueFullError

# Clients do not honour longer waits (the OpenAI SDKs ignore more than 120 s).
LONGEST_WAIT_S = 120.0
# The longest that is told before anything has been measured: soon more will be known.
LONGEST_GUESS_S = 5.0
# The shortest that is told, so that nobody asks without pause.
LEAST_WAIT_S = 0.1
# How long after its time a refused client is still expected back.
PROMISE_KEPT_S = 3.0
# Promises that are remembered; each costs time at every check, and a client that asks without
# pause is given many.
MOST_PROMISES = 1000
# One more place for every so many, and as much more work, open to clients of whom nothing
# waits yet and to those who come back as they were told.
EXTRA_SHARE = 4
# One job counts as at most this share of the work and of the pixels that may be accepted: it
# alone must not shut out the small ones, which pass it between two of its steps.
LARGEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait and run at most.

    Attributes:
        jobs: jobs that wait.
        pixels: of the pictures that waiting jobs draw and hold.
        work_s: estimated seconds of all that waits and runs.
            Of both, one job counts for at most ``LARGEST_SHARE``.
        in_flight: jobs that have begun and not been answered.
    """

    jobs: int = 32
    pixels: int = 256_000_000
    work_s: float = 600.0
    in_flight: int = 8


class Load(NamedTuple):
    """What one job puts on the queue.

    Attributes:
        is_waiting: it has not begun.
        is_bounded: it counts towards the limits. Jobs that were accepted before have
            bounds of their own; they only take time.
    """

    work_s: float
    pixels: int
    is_waiting: bool = True
    is_bounded: bool = True


class Asker(NamedTuple):
    """Who asks for a place.

    Attributes:
        own_waiting: waiting jobs of the same client.
        request: the same for a request that is sent again; None while it is not known.
    """

    own_waiting: int
    request: int | None


class _Promise(NamedTuple):
    due_s: float
    request: int | None


class Admission:
    """Keeps the bounds and the promises. Call it under the scheduler's lock.

    A place that comes free is kept for those who were told to come back for it, so that
    others who happen to ask first do not make the promise untrue. Half of all places are
    never kept: who was refused may not come back, and the device must not wait for it.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._promises: list[_Promise] = []

    def check(
        self,
        asker: Asker,
        wanted: Load,
        present: Sequence[Load],
        now_s: float,
        foreseen: Callable[[], Sequence[Load]],
        *,
        is_measured: bool,
    ) -> None:
        """Let one more job pass, or refuse it.

        Args:
            present: all that waits and runs.
            foreseen: the same in the order in which it should be done.
            is_measured: whether the loads rest on anything but guesses.

        Raises:
            QueueFullError: with the time after which it should be let in.
        """
        own = self._promise_of(asker, now_s)
        bounded = [load for load in present if load.is_bounded]
        waiting = [load for load in bounded if load.is_waiting]
        limits = self._limits
        places, most_s = limits.jobs, limits.work_s
        is_due = own is not None and own.due_s <= now_s
        if asker.own_waiting == 0 or is_due:
            places += max(1, limits.jobs // EXTRA_SHARE)
            most_s += limits.work_s / EXTRA_SHARE
        if own is None and asker.request is not None:
            places -= min(len(self._promises), limits.jobs // 2)
        pixels = sum(self._counted_pixels(load) for load in (*waiting, wanted))
        work_s = sum(self._counted_s(load) for load in (*bounded, wanted))
        if len(waiting) >= places:
            bound, what = "jobs", f"{len(waiting)} jobs wait"
        elif waiting and pixels > limits.pixels:
            held = sum(load.pixels for load in (*waiting, wanted))
            bound, what = "pixels", f"waiting jobs would hold {held} pixels"
        elif bounded and work_s > most_s:
            present_s = sum(load.work_s for load in bounded)
            bound, what = "work", f"there is work for about {present_s:.0f} s"
        else:
            return
        if own is not None:
            self._promises.remove(own)
        # Those who were to come later than this one do not go before it.
        before = [p for p in self._promises if own is None or p.due_s < own.due_s]
        wait_s = self._free_in_s(wanted, foreseen(), len(before))
        wait_s = max(min(wait_s, LONGEST_WAIT_S if is_measured else LONGEST_GUESS_S), LEAST_WAIT_S)
        if len(self._promises) < MOST_PROMISES:
            self._promises.append(_Promise(now_s + wait_s, asker.request))
        raise QueueFullError(
            f"the queue is full: {what}; try again later", bound=bound, retry_after_s=wait_s
        )

    def admitted(self, asker: Asker, now_s: float) -> None:
        """Somebody was let in, who may have been refused before."""
        own = self._promise_of(asker, now_s)
        if own is not None:
            self._promises.remove(own)

    def _promise_of(self, asker: Asker, now_s: float) -> _Promise | None:
        """What this request was told; one that is not known is taken for one that is due."""
        self._promises = [p for p in self._promises if p.due_s + PROMISE_KEPT_S > now_s]
        known = [p for p in self._promises if p.request is not None and p.request == asker.request]
        due = [p for p in self._promises if p.request is None and p.due_s <= now_s]
        return min(known or due, key=lambda promise: promise.due_s, default=None)

    def _counted_s(self, load: Load) -> float:
        return min(load.work_s, LARGEST_SHARE * self._limits.work_s)

    def _counted_pixels(self, load: Load) -> float:
        return min(load.pixels, LARGEST_SHARE * self._limits.pixels)

    def _free_in_s(self, wanted: Load, foreseen: Sequence[Load], promised: int) -> float:
        """When there is room, after so many who were refused before have come back."""
        # What those will ask for who come back is not known; something like the rest.
        mean_s = sum(load.work_s for load in foreseen) / max(len(foreseen), 1)
        limits, loads = self._limits, [*foreseen, *[Load(mean_s, 0)] * promised]
        waiting = [load for load in loads if load.is_bounded and load.is_waiting]
        places = limits.jobs - len(waiting)
        pixels = limits.pixels - sum(self._counted_pixels(load) for load in (*waiting, wanted))
        # Work that must be done before the new one's fits.
        excess_s = sum(self._counted_s(load) for load in loads if load.is_bounded)
        excess_s += self._counted_s(wanted) - limits.work_s
        place_s = 0.0 if places > 0 and pixels >= 0 else math.inf
        work_s = 0.0 if excess_s <= 0 else math.inf
        elapsed_s = 0.0
        for load in loads:
            if load.is_bounded and load.is_waiting:
                # It begins, and leaves its place.
                places, pixels = places + 1, pixels + self._counted_pixels(load)
                if places > 0 and pixels >= 0:
                    place_s = min(place_s, elapsed_s)
            if load.is_bounded:
                counted_s = self._counted_s(load)
                if counted_s >= excess_s:
                    # Of a very long job, only the last part is counted.
                    work_s = min(work_s, elapsed_s + load.work_s - counted_s + excess_s)
                excess_s -= counted_s
            elapsed_s += load.work_s
        # A job that fits into no bound is let in when nothing else is there.
        return min(max(place_s, work_s, 0.0), elapsed_s)
