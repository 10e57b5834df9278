"""One kept job that is not finished yet, in memory.

Owns what its watchers hear: the engine's events while the engine has it, its place
before that, and its end only when the end is on the disk.
"""

from __future__ import annotations

from app.engine import Job, JobEvent, Priority, Queued, Settled
from app.engine.events import EventLog
from app.jobs.records import JobRecord

_RANKS = {Priority.INTERACTIVE: 0, Priority.NORMAL: 1, Priority.BATCH: 2}


class LiveJob:
    """See the module. Holds no prompt and no picture: thousands may wait.

    Attributes:
        id: the job's.
        order: its place among those that wait: by class, then by acceptance.
        deadline_s: when it is given up, in seconds since 1970.
        is_suspect: the process once ended while it ran.
        job: the engine's, once the engine has it.
        events: what becomes of it, for those who watch.
    """

    def __init__(self, record: JobRecord) -> None:
        self.id = record.id
        self.order = (_RANKS[Priority(record.priority)], record.number)
        self.deadline_s = record.deadline_s
        self.is_suspect = record.attempts > 0
        self.job: Job | None = None
        self.events = EventLog()
        # It waits; whoever watches is told where.
        self.events.emit(Queued(1, None))

    def hear(self, event: JobEvent) -> None:
        """Pass an event of the engine on; the end is told by who records it."""
        if not isinstance(event, Settled):
            self.events.emit(event)

    def current(self, place: Queued | None) -> list[JobEvent]:
        """The events that hold now; ``place`` is newer than the one last told."""
        found: list[JobEvent] = []
        self.events.watch(found.append, place)()
        return found
