"""A job's events on their way to a reader who falls behind."""

from __future__ import annotations

import asyncio
import threading

from app.api.job_events import JobWatch
from app.engine import (
    JobEvent,
    PackedPicture,
    Preview,
    Queued,
    Settled,
    Started,
    StepDone,
)
from app.engine.events import EventLog

PICTURE = PackedPicture(b"x", "png", 0, 64, 64)


def heard(*events: JobEvent) -> list[JobEvent]:
    """What a reader gets who begins to read when all has happened, on other threads."""

    async def read() -> list[JobEvent]:
        log = EventLog()
        watch = JobWatch(log.watch)

        def tell() -> None:
            for event in events:
                log.emit(event)

        teller = threading.Thread(target=tell)
        teller.start()
        await asyncio.to_thread(teller.join)
        await asyncio.sleep(0)
        found: list[JobEvent] = []
        while not found or not isinstance(found[-1], Settled):
            found.append(await asyncio.wait_for(watch.next(), 10))
        watch.close()
        return found

    return asyncio.run(read())


def test_old_places_and_steps_are_missed_and_the_end_is_not() -> None:
    steps = [
        StepDone(image, step, 3, 3 * image + step, None) for image in (0, 1) for step in (1, 2, 3)
    ]
    assert heard(Queued(3, None), Queued(2, None), Started(), *steps, Settled()) == [
        Queued(2, None),
        Started(),
        StepDone(0, 3, 3, 3, None),
        StepDone(1, 3, 3, 6, None),
        Settled(),
    ]


def test_only_the_last_few_previews_wait() -> None:
    previews = [Preview(0, step, PICTURE) for step in range(10)]
    assert heard(Started(), *previews, Settled()) == [Started(), *previews[-4:], Settled()]


def test_nothing_is_missed_by_a_reader_who_keeps_up() -> None:
    async def read() -> list[JobEvent]:
        log = EventLog()
        watch = JobWatch(log.watch)
        found = []
        steps = [StepDone(0, step, 5, step, None) for step in range(1, 6)]
        for event in (Started(), *steps, Settled()):
            log.emit(event)
            found.append(await asyncio.wait_for(watch.next(), 10))
        return found

    assert len(asyncio.run(read())) == 7
