"""Which job runs its next slice. Pure: it is told the time, and has no locks or threads.

The rule, in order:
1. The oldest job gets at least ``OLDEST_SHARE`` of the device, whatever else waits.
   So every job becomes the oldest, and ends: nothing starves.
2. Of the rest, the better priority class goes first.
3. Within a class, the shortest remaining work. A job whose deadline is near counts as
   shorter, and one that has not begun as longer, the more its client has had.
4. A job that has begun gives way only to one that counts as shorter, and when several
   have begun, only to one of half its length: each start holds memory.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from heapq import nsmallest

from app.engine.costs import CostModel, WorkLeft
from app.engine.jobs import Job, Priority
from app.engine.joining import Joining
from app.engine.shares import Shares

OLDEST_SHARE = 0.25
# How far ahead of its share the oldest may be counted, in seconds of the device: for four
# times as long shorter jobs then run without a break.
OLDEST_LEAD_S = 5.0
# A client that has had so many seconds more than others counts as asking for twice the work.
FAIRNESS_S = 10.0
# A job is urgent when its deadline leaves it less than so many times its work to spare; it
# then counts as so much shorter.
URGENT_SPARE = 0.5
URGENT_FACTOR = 0.25
# How much shorter than a running job another must be to start, when several are in flight.
NESTED_FACTOR = 0.5

_CLASS = {Priority.INTERACTIVE: 0, Priority.NORMAL: 1, Priority.BATCH: 2}
Key = tuple[int, float, int]


@dataclass(slots=True, eq=False)
class Entry:
    """One job as the policy sees it.

    Attributes:
        sequence: the order of acceptance.
        deadline_s: on the clock of ``now_s``.
        likeness: equal for jobs whose steps may be taken as one; None for those that go alone.
        is_active: its first slice has been given to the worker.
        is_ahead: the worker was told that it may begin it before that.
        told_position: what its watchers were last told.
    """

    job: Job
    sequence: int
    left: WorkLeft
    deadline_s: float | None
    likeness: Hashable | None = None
    is_active: bool = False
    is_ahead: bool = False
    told_position: int | None = None
    estimate_s: float = 0.0
    estimate_version: int = -1


class Policy:
    """Chooses, and keeps account of what has been served."""

    def __init__(self) -> None:
        self.costs = CostModel()
        self.shares = Shares()
        self.joining = Joining()
        # Seconds of the device that the oldest job has a claim to.
        self._claim_s = 0.0
        self._oldest: Entry | None = None

    def remaining_s(self, entry: Entry) -> float:
        """The work that a job still needs."""
        if entry.estimate_version != self.costs.version:
            entry.estimate_s = entry.left.estimate_s(self.costs)
            entry.estimate_version = self.costs.version
        return entry.estimate_s

    def expected_s(self, entry: Entry, now_s: float) -> float:
        """The seconds that a job will still have of the device: it may not live to have them all.

        One that was cancelled ends with the slice in hand, any other at its deadline.
        """
        if entry.job.cancelled is not None:
            return self.costs.estimate_s(entry.left.next_unit) if entry.is_active else 0.0
        remaining_s = self.remaining_s(entry)
        if entry.deadline_s is not None:
            remaining_s = min(remaining_s, max(0.0, entry.deadline_s - now_s))
        return remaining_s

    def key(self, entry: Entry, now_s: float) -> Key:
        """Sorts jobs by who goes first, the oldest job's share aside."""
        remaining_s = self.remaining_s(entry)
        weighed_s = remaining_s
        if not entry.is_active:
            weighed_s *= 1 + self.shares.lead_s(entry.job.options.client) / FAIRNESS_S
        if entry.deadline_s is not None:
            spare_s = entry.deadline_s - now_s - remaining_s
            if 0 <= spare_s < URGENT_SPARE * remaining_s:
                weighed_s *= URGENT_FACTOR
        return (_CLASS[entry.job.options.priority], weighed_s, entry.sequence)

    def choose(
        self,
        waiting: Collection[Entry],
        active: Collection[Entry],
        now_s: float,
        *,
        may_start: bool,
    ) -> Entry | None:
        """The job whose slice is next; None when there is none that may run.

        Args:
            may_start: whether one more job may be in flight.
        """
        startable = waiting if may_start else ()
        self._oldest = min((*startable, *active), key=lambda entry: entry.sequence, default=None)
        if self._oldest is None:
            return None
        if len(startable) + len(active) == 1:
            return self._oldest
        if self._is_owed(self._oldest):
            return self._oldest
        running = min(active, key=lambda entry: self.key(entry, now_s), default=None)
        best = min(startable, key=lambda entry: self.key(entry, now_s), default=None)
        if running is None or best is None:
            return running or best
        is_nested = len(active) > 1
        return best if self._gives_way(running, best, now_s, is_nested=is_nested) else running

    def foresee(
        self,
        waiting: Collection[Entry],
        active: Collection[Entry],
        now_s: float,
        *,
        may_start: bool,
    ) -> Entry | None:
        """What ``choose`` would say; nothing is done, and no account is kept of it."""
        oldest = self._oldest
        chosen = self.choose(waiting, active, now_s, may_start=may_start)
        self._oldest = oldest
        return chosen

    def company(
        self,
        chosen: Entry,
        waiting: Collection[Entry],
        active: Collection[Entry],
        now_s: float,
        *,
        may_start: int,
    ) -> list[Entry]:
        """Jobs whose steps are better taken with the chosen one's, in their order.

        Some of them may still have to be brought to where the chosen one stands; it waits for
        none while it has a claim to the device, so that it does not do so without end.

        Args:
            may_start: how many more may be in flight. One place is left for who is shorter.
        """
        kind, is_alone = chosen.likeness, len(waiting) + len(active) == 1
        if is_alone or kind is None or not chosen.left.steps or not self.joining.may_pay(kind):
            return []
        is_at_start = chosen.left.steps == chosen.left.all_steps
        waits = is_at_start and not self._is_owed(chosen)

        def is_beside(entry: Entry) -> bool:
            return entry.is_active and entry.left.steps == chosen.left.steps

        def may_come(entry: Entry) -> bool:
            return is_beside(entry) or (waits and entry.left.steps is None)

        def first(entry: Entry) -> tuple[bool, bool, Key]:
            return not is_beside(entry), not entry.is_active, self.key(entry, now_s)

        lead_s = self.shares.lead_s(chosen.job.options.client) + self.remaining_s(chosen)
        places = may_start - 1 if waits else 0
        entries = (*active, *nsmallest(places, waiting, key=lambda e: self.key(e, now_s)))
        alike = [
            entry
            for entry in entries
            if entry is not chosen
            and entry.likeness == kind
            and entry.job.options.priority == chosen.job.options.priority
            and entry.job.cancelled is None
            # A client that has had more does not go along at the cost of one that has had less.
            and self.shares.lead_s(entry.job.options.client) <= lead_s
            and may_come(entry)
        ]
        jobs = len(waiting) + len(active)
        count = self.joining.best(kind, 1 + len(alike), jobs)
        company = sorted(alike, key=first)[: count - 1]
        joint_s = count * self.joining.share(kind, count) * self.remaining_s(chosen)
        in_time = all(
            entry.deadline_s is None or now_s + joint_s <= entry.deadline_s
            for entry in (chosen, *company)
        )
        return company if in_time else []

    def foreseen(
        self, waiting: Collection[Entry], active: Collection[Entry], now_s: float, places: int
    ) -> list[Entry]:
        """All jobs in the order in which they should be done, if nobody else comes.

        Args:
            places: how many more may begin beside the active ones.
        """

        def first(entry: Entry) -> Key:
            return self.key(entry, now_s)

        begun, rest = sorted(active, key=first), sorted(waiting, key=first)
        order, i = [], 0
        for entry in rest:
            while i < len(begun):
                is_nested = i + 1 < len(begun)
                may_start = places + i > 0
                if may_start and self._gives_way(begun[i], entry, now_s, is_nested=is_nested):
                    break
                order.append(begun[i])
                i += 1
            order.append(entry)
        return [*order, *begun[i:]]

    def served(self, entry: Entry, took_s: float) -> None:
        """The device worked for a job that ``choose`` has chosen."""
        self.shares.served(entry.job.options.client, took_s)
        claim_s = self._claim_s + OLDEST_SHARE * took_s
        if entry is self._oldest:
            claim_s -= took_s
        if claim_s > OLDEST_LEAD_S:
            most_s = 0.0
            if self._oldest is not None:
                most_s = self.costs.estimate_s(self._oldest.left.next_unit)
            claim_s = min(claim_s, max(most_s, OLDEST_LEAD_S))
        self._claim_s = max(claim_s, -OLDEST_LEAD_S)

    def slice_done(self, entry: Entry, stage: str, took_s: float) -> None:
        """A slice was done: the job needs one less, and its cost is known better."""
        self.costs.observe(entry.left.unit(stage), took_s)
        entry.left.done(stage)
        entry.estimate_version = -1

    def _is_owed(self, entry: Entry) -> bool:
        """Whether a job is the oldest and has had less than its share."""
        next_s = self.costs.estimate_s(entry.left.next_unit)
        return entry is self._oldest and self._claim_s >= next_s

    def _gives_way(self, running: Entry, other: Entry, now_s: float, *, is_nested: bool) -> bool:
        rank, weighed_s, _ = self.key(running, now_s)
        other_rank, other_weighed_s, _ = self.key(other, now_s)
        if rank != other_rank:
            return other_rank < rank
        return other_weighed_s < (NESTED_FACTOR if is_nested else 1.0) * weighed_s
