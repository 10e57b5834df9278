"""The jobs that wait and those in flight, and whose slice the worker runs next.

Owns the lock around the order (``policy``) and the bounds (``admission``). Knows
nothing of what a slice does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from app.engine.admission import Admission, Asker, Limits, Load
from app.engine.costs import WorkLeft
from app.engine.events import Queued
from app.engine.jobs import Job
from app.engine.joining import likeness
from app.engine.policy import Entry, Policy
from app.errors import JobTimeoutError, ServiceError


@dataclass(frozen=True, slots=True)
class Turn:
    """What the worker is to do with a job: its next slice, unless something else stands here.

    Attributes:
        end: why to end it.
        beside: other jobs whose steps are to be taken with its own, as one.
        trial: find out whether the steps of so many jobs like this one are better taken as one.
        is_gone: let go of it: it may have been begun ahead, and has left since.
    """

    job: Job
    end: ServiceError | None = None
    beside: tuple[Job, ...] = ()
    trial: int | None = None
    is_gone: bool = False


class Scheduler:
    """Jobs from their admission until the device is done with them.

    ``check``, ``admit``, ``remove``, ``place`` and ``eta_s`` are called from any thread, ``take``
    and what else follows it from the worker's.

    Args:
        limits: what may wait and be in flight.
        clock: seconds, growing.
        joins: whether steps of several jobs may be taken as one.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        *,
        joins: bool = False,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._joins = joins
        self._policy = Policy()
        self._admission = Admission(limits)
        self._waiting: dict[Job, Entry] = {}
        self._active: dict[Job, Entry] = {}
        # Jobs that may have been begun ahead and wait no more; the worker is to hear of them.
        self._gone: list[Job] = []
        self._packing = 0
        self._accepted = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def active(self) -> list[Job]:
        """Jobs that have begun and need the device again."""
        with self._changed:
            return list(self._active)

    @property
    def is_alone(self) -> bool:
        """Whether there is one job and no other, be it one that waits or one that has begun."""
        return len(self._waiting) + len(self._active) == 1

    @property
    def in_flight(self) -> int:
        """Jobs that have begun and are not answered."""
        return len(self._active) + self._packing

    @property
    def work_s(self) -> float:
        """Estimated seconds of all that waits and runs."""
        with self._changed:
            entries, now_s = (*self._active.values(), *self._waiting.values()), self._clock()
            return sum(self._policy.expected_s(entry, now_s) for entry in entries)

    def check(self, client: str) -> None:
        """Refuse before a request's body is worked on.

        Raises:
            QueueFullError: with the time after which there should be room.
        """
        with self._changed:
            self._check(self._asker(client, None), Load(0.0, 0))

    def admit(self, job: Job) -> bool:
        """Let a job wait for its turn. False once the scheduler is closed.

        Raises:
            QueueFullError: with the time after which there should be room.
        """
        options = job.options
        left = WorkLeft(job.params, job.resolved, options.previews)
        with self._changed:
            now_s = self._clock()
            if not options.is_admitted:
                work_s = left.estimate_s(self._policy.costs)
                if options.deadline_s is not None:
                    work_s = min(work_s, options.deadline_s)
                asker = self._asker(options.client, job.signature)
                self._check(asker, Load(work_s, left.pixels))
            if self._closed:
                return False
            if not options.is_admitted:
                self._admission.admitted(asker, now_s)
            self._accepted += 1
            deadline_s = None if options.deadline_s is None else now_s + options.deadline_s
            kind = likeness(job.params, job.resolved) if self._joins else None
            self._waiting[job] = Entry(job, self._accepted, left, deadline_s, kind)
            self._policy.shares.joined(options.client)
            job.outlook = self
            self._changed.notify()
        self._tell_places()
        return True

    def take(self) -> Turn | None:
        """Wait for the next turn; None once the scheduler is closed and nothing is left."""
        with self._changed:
            while True:
                before = len(self._waiting)
                turn = self._next_turn()
                if turn is not None:
                    is_moved = len(self._waiting) != before
                    break
                if self._closed and not self._waiting and not self._active:
                    return None
                self._changed.wait(self._until_deadline_s())
        if is_moved:
            self._tell_places()
        return turn

    def poll(self) -> Turn | None:
        """The next turn, if there is one now."""
        with self._changed:
            return self._next_turn()

    def next_after(self, job: Job) -> Job | None:
        """The waiting job that would begin if this one, which is in flight, were done.

        The worker may begin it ahead. It goes on waiting, another may yet pass it, and a turn tells
        if it leaves.
        """
        with self._changed:
            chosen = self._policy.foresee(
                self._waiting.values(),
                [entry for other, entry in self._active.items() if other is not job],
                self._clock(),
                may_start=self._may_start,
            )
            if chosen is None or chosen.is_active:
                return None
            chosen.is_ahead = True
            return chosen.job

    def slice_done(self, job: Job, stage: str, took_s: float) -> None:
        """The worker has run a slice of a stage."""
        with self._changed:
            entry = self._active[job]
            self._policy.served(entry, took_s)
            self._policy.slice_done(entry, stage, took_s)

    def learned(self, job: Job, count: int, share: float) -> None:
        """Steps of so many jobs like this one, taken as one, take this share of their time."""
        with self._changed:
            self._policy.joining.learned(self._active[job].likeness, count, share)

    def expected_s(self, job: Job) -> float | None:
        """What a job's next slice should take, a preview included.

        None before any measurement, and for a job that is done.
        """
        with self._changed:
            costs, entry = self._policy.costs, self._active.get(job)
            if entry is None or not costs.is_measured:
                return None
            left = entry.left
            return costs.estimate_s(left.next_unit) + costs.estimate_s(left.unit("decode"))

    def finished(self, job: Job) -> None:
        """The worker is done with a job."""
        with self._changed:
            self._active.pop(job)
            self._policy.shares.left(job.options.client)

    def packing(self, change: int) -> None:
        """One job more (1) or less (-1) is drawn and being packed."""
        with self._changed:
            self._packing += change
            # Who waits for a place may have it; else the worker would wake for nothing, and take
            # the interpreter from the thread that sends the answer.
            if self._waiting:
                self._changed.notify()

    def remove(self, job: Job) -> bool:
        """Take a waiting job out. False when it is not waiting (any more)."""
        with self._changed:
            entry = self._waiting.pop(job, None)
            if entry is None:
                return False
            self._left(entry)
            if entry.is_ahead:
                self._changed.notify()
        self._tell_places()
        return True

    def close(self) -> list[Job]:
        """Admit nothing more and hand back what waits; ``take`` ends after what is in flight."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            for entry in self._waiting.values():
                self._left(entry)
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def calibrate(self, width: int, height: int, took_s: float) -> None:
        """A warm-up picture of one step took so long."""
        with self._changed:
            self._policy.costs.calibrate(width, height, took_s)

    def place(self, job: Job) -> Queued | None:
        """A job's present place; None once it waits no more."""
        with self._changed:
            if job not in self._waiting:
                return None
            return next(place for entry, place in self._places() if entry.job is job)

    def eta_s(self, job: Job) -> float | None:
        """When a job in flight should be done, in seconds from now."""
        with self._changed:
            entry = self._active.get(job)
            if entry is None or not self._policy.costs.is_measured:
                return None
            now_s = self._clock()
            key = self._policy.key(entry, now_s)
            entries = (*self._active.values(), *self._waiting.values())
            return sum(
                self._policy.expected_s(other, now_s)
                for other in entries
                if self._policy.key(other, now_s) <= key
            )

    def _left(self, entry: Entry) -> None:
        """A job that waited was taken out."""
        self._policy.shares.left(entry.job.options.client)
        if entry.is_ahead:
            self._gone.append(entry.job)

    @property
    def _may_start(self) -> bool:
        return self.in_flight < self._limits.in_flight

    def _next_turn(self) -> Turn | None:
        if self._gone:
            return Turn(self._gone.pop(), is_gone=True)
        now_s = self._clock()
        for job in self._active:
            if job.cancelled is not None:
                return Turn(job, job.cancelled)
        for entries in (self._active, self._waiting):
            for entry in entries.values():
                if entry.deadline_s is not None and entry.deadline_s <= now_s:
                    return self._overdue(entry)
        entry_chosen = self._policy.choose(
            self._waiting.values(),
            self._active.values(),
            now_s,
            may_start=self._may_start,
        )
        if entry_chosen is None:
            return None
        return self._turn_of(entry_chosen, now_s)

    def _turn_of(self, chosen: Entry, now_s: float) -> Turn:
        """The chosen job's slice, or what has to come before it is taken with others'."""
        company = self._policy.company(
            chosen,
            self._waiting.values(),
            self._active.values(),
            now_s,
            may_start=max(0, self._limits.in_flight - self.in_flight),
        )
        count = 1 + len(company)
        if company and self._policy.joining.is_untried(chosen.likeness, count):
            return Turn(chosen.job, trial=count)
        late = next((entry for entry in company if entry.left.steps is None), None)
        if late is not None:
            chosen, company = late, []
        if not chosen.is_active:
            chosen.is_active = True
            self._active[chosen.job] = self._waiting.pop(chosen.job)
        return Turn(chosen.job, beside=tuple(entry.job for entry in company))

    def _overdue(self, entry: Entry) -> Turn:
        job = entry.job
        if not entry.is_active:
            del self._waiting[job]
            self._policy.shares.left(job.options.client)
        reason = JobTimeoutError(
            f"the job was not done by its deadline of {job.options.deadline_s:g} s and has been "
            "cancelled; ask for a smaller size, fewer steps or fewer pictures, or for more time"
        )
        return Turn(job, reason)

    def _until_deadline_s(self) -> float | None:
        """How long the worker may sleep."""
        deadlines = [e.deadline_s for e in self._waiting.values() if e.deadline_s is not None]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _foreseen(self) -> list[Entry]:
        """All entries in the order in which they should be done."""
        return self._policy.foreseen(
            self._waiting.values(),
            self._active.values(),
            self._clock(),
            places=self._limits.in_flight - self.in_flight,
        )

    def _asker(self, client: str, request: int | None) -> Asker:
        own = sum(
            job.options.client == client and not job.options.is_admitted for job in self._waiting
        )
        return Asker(own, request)

    def _check(self, asker: Asker, wanted: Load) -> None:
        self._admission.check(
            asker,
            wanted,
            self._loads((*self._active.values(), *self._waiting.values())),
            self._clock(),
            foreseen=lambda: self._loads(self._foreseen()),
            is_measured=self._policy.costs.is_measured,
        )

    def _loads(self, entries: Iterable[Entry]) -> list[Load]:
        now_s = self._clock()
        return [
            Load(
                self._policy.expected_s(entry, now_s),
                entry.left.pixels,
                is_waiting=not entry.is_active,
                is_bounded=not entry.job.options.is_admitted,
            )
            for entry in entries
        ]

    def _places(self) -> Iterator[tuple[Entry, Queued]]:
        """Every waiting job and its place."""
        position, elapsed_s = 0, 0.0
        is_measured, now_s = self._policy.costs.is_measured, self._clock()
        for entry in self._foreseen():
            if not entry.is_active:
                position += 1
                yield entry, Queued(position, elapsed_s if is_measured else None)
            elapsed_s += self._policy.expected_s(entry, now_s)

    def _tell_places(self) -> None:
        """Tell those whose place has changed, outside the lock: listeners may hold locks."""
        with self._changed:
            if not any(job.events.is_watched for job in self._waiting):
                return
            changed = []
            for entry, place in self._places():
                if entry.job.events.is_watched and entry.told_position != place.position:
                    entry.told_position = place.position
                    changed.append((entry.job, place))
        for job, place in changed:
            job.events.emit(place)
