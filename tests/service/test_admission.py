"""Who is let in, who is turned away, and how long those are told to wait."""

from __future__ import annotations

import random

import pytest

from app.engine.admission import LONGEST_GUESS_S, LONGEST_WAIT_S, MOST_PROMISES, Limits
from app.engine.events import Queued
from app.engine.jobs import DEFAULT_OPTIONS, Job, Priority
from app.errors import QueueFullError
from tests.service.simulated_device import STEP_S, TEXT_S, device, make, refused, wait_s, work_s


def test_a_full_queue_says_when_the_next_place_comes_free() -> None:
    made = device(Limits(jobs=2, work_s=1e6))
    for name in "abc":
        made.scheduler.admit(make(name, 512))
        made.step()
    assert made.scheduler.depth == 2
    # Each client that is turned away is given a place of its own.
    each_s = work_s(make(side=512))
    waits = [wait_s(refused(made, make("d", 512))) for _ in range(3)]
    first_s = each_s - TEXT_S - 2 * STEP_S[512]
    assert waits == pytest.approx([first_s, first_s + each_s, first_s + 2 * each_s], rel=0.1)
    assert refused(made, make("d", 512)).bound == "jobs"


def test_before_anything_is_measured_no_long_wait_is_told() -> None:
    made = device(Limits(jobs=1, work_s=1e6), is_measured=False)
    made.scheduler.admit(make("a", 1024, steps=50))
    assert 0 < wait_s(refused(made, make("b"))) <= LONGEST_GUESS_S


def test_a_wait_is_never_longer_than_clients_honour() -> None:
    made = device(Limits(jobs=1, work_s=1e6))
    made.scheduler.admit(make("a", 1024, steps=50))
    made.step()
    made.scheduler.admit(make("b", 1024, steps=50))
    assert wait_s(refused(made, make("c"))) == LONGEST_WAIT_S


def test_pixels_and_work_are_bounded_but_a_single_job_always_fits() -> None:
    made = device(Limits(jobs=100, pixels=600_000, work_s=1e6))
    made.scheduler.admit(make("huge", 1024))
    made.step()
    made.scheduler.admit(make("a", 512))
    made.scheduler.admit(make("b", 512))
    assert refused(made, make("c", 512)).bound == "pixels"
    made.scheduler.admit(make("small", 256))
    # One that is larger than all may be counts as half of it, and leaves room for others.
    made = device(Limits(jobs=100, pixels=600_000, work_s=1e6))
    made.scheduler.admit(make("runs"))
    made.step()
    made.scheduler.admit(make("huge", 1024))
    made.scheduler.admit(make("a", 512))
    assert refused(made, make("b", 512)).bound == "pixels"
    made = device(Limits(jobs=100, work_s=40.0))
    made.scheduler.admit(make("long", 512, steps=50))
    made.scheduler.admit(make("waits", 512, steps=25))
    error = refused(made, make("a", 256))
    assert error.bound == "work"
    # It fits once so much has been done of the one that counts with its last 20 s.
    excess_s = 20.0 + 20.0 + work_s(make()) - 40.0
    behind_s = work_s(make(side=512, steps=25)) - 20.0 + excess_s
    assert wait_s(error) == pytest.approx(behind_s, rel=0.1)


@pytest.mark.parametrize("client", ["greedy", "other"])
def test_one_endless_job_does_not_shut_out_short_ones(client: str) -> None:
    made = device(Limits(jobs=100, work_s=10.0))
    made.scheduler.admit(make("endless", 1024, steps=50, n=10, client="greedy"))
    made.step()
    short = make("short", client=client)
    made.scheduler.admit(short)
    accepted_s = made.clock.now_s
    while short not in made.ended:
        made.step()
    assert made.ended[short][1] - accepted_s <= work_s(short) + STEP_S[1024]


def test_endless_jobs_of_one_client_leave_work_for_another() -> None:
    made = device(Limits(jobs=100, work_s=10.0))
    for name in "ab":
        made.scheduler.admit(make(name, 1024, steps=50, client="greedy"))
    assert refused(made, make("c", 1024, steps=50, client="greedy")).bound == "work"
    made.scheduler.admit(make("short", client="other"))


def test_a_client_without_a_waiting_job_finds_a_place_in_a_full_queue() -> None:
    made = device(Limits(jobs=4, work_s=1e6))
    for i in range(5):
        made.scheduler.admit(make(f"flood {i}", client="flood"))
        made.step()
    refused(made, make("one more", client="flood"))
    made.scheduler.admit(make("other", client="other"))
    refused(made, make("other again", client="other"))
    refused(made, make("third", client="third"))


def test_a_flood_of_refused_requests_is_not_remembered_without_end() -> None:
    made = device(Limits(jobs=1, work_s=1e6))
    made.scheduler.admit(make("runs", 1024, steps=50))
    made.step()
    made.scheduler.admit(make("waits", 1024, steps=50))
    for _ in range(MOST_PROMISES + 50):
        with pytest.raises(QueueFullError):
            made.scheduler.check(DEFAULT_OPTIONS.client)
    assert len(made.scheduler._admission._promises) == MOST_PROMISES
    assert wait_s(refused(made, make("one more"))) == LONGEST_WAIT_S


def test_places_are_told_in_the_order_that_is_foreseen() -> None:
    made = device()
    made.scheduler.admit(make("running", 256))
    made.step()
    long, short = make("long", 512), make("short", 256)
    for job in (long, short):
        made.scheduler.admit(job)
    seen: list[object] = []
    long.watch(seen.append)
    short.watch(seen.append)
    left_s = work_s(make()) - TEXT_S
    assert seen == [
        Queued(2, pytest.approx(left_s + work_s(short), rel=0.1)),
        Queued(1, pytest.approx(left_s, rel=0.1)),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_clients_that_come_back_when_told_are_let_in(seed: int) -> None:
    """Retry-After proves honest within a factor of 2."""
    chance = random.Random(seed)
    made = device(Limits(jobs=8, work_s=1e6, in_flight=4))
    started_s = made.clock.now_s
    # (when it comes, job, when it was first refused, what it was told)
    coming: list[tuple[float, Job, float | None, float]] = [
        (started_s + chance.uniform(0, 2), make(f"{i}", chance.choice([256, 512])), None, 0.0)
        for i in range(60)
    ]
    waits = []
    while coming:
        coming.sort(key=lambda each: each[0])
        when_s, job, first_s, told_s = coming[0]
        if when_s > made.clock.now_s:
            if not made.step():
                made.clock.now_s = when_s
            continue
        coming.pop(0)
        now_s = made.clock.now_s
        try:
            made.scheduler.admit(job)
        except QueueFullError as error:
            wait = wait_s(error)
            if first_s is None:
                first_s, told_s = now_s, wait
            coming.append((now_s + wait, job, first_s, told_s))
        else:
            if first_s is not None:
                waits.append((told_s, now_s - first_s))
    made.run()
    assert len(waits) > 30
    # Retry-After counts whole seconds; what is told beside it may be finer than a step.
    broken = [(told, took) for told, took in waits if took > max(2 * told, told + STEP_S[512])]
    assert len(broken) <= 0.05 * len(waits), broken


@pytest.mark.parametrize("seed", range(20))
def test_a_wait_is_what_it_takes_until_there_is_room(seed: int) -> None:
    chance = random.Random(seed)
    made = device(Limits(jobs=6, work_s=1e6, in_flight=4))
    made.noise = lambda: chance.uniform(0.8, 1.25)
    while True:
        job = make(
            "x",
            chance.choice([256, 512, 512]),
            steps=chance.choice([4, 8, 20]),
            priority=chance.choice(list(Priority)),
        )
        try:
            made.scheduler.admit(job)
        except QueueFullError as error:
            told_s = wait_s(error)
            break
        made.step()
    refused_s = made.clock.now_s
    while made.scheduler.depth >= 6:
        made.step()
    waited_s = made.clock.now_s - refused_s
    # Nothing is finer than the step that runs.
    assert abs(told_s - waited_s) <= STEP_S[512] or 0.5 <= told_s / waited_s <= 2
