"""The scheduler alone, on a clock of its own: order, shares, deadlines and cancels."""

from __future__ import annotations

import itertools

import pytest

from app.engine.admission import Limits
from app.engine.jobs import Job, Priority
from app.engine.policy import OLDEST_LEAD_S, OLDEST_SHARE
from app.errors import ClientLeftError, JobTimeoutError
from tests.service.fake_pipeline import slices_of
from tests.service.simulated_device import STEP_S, device, make, refused, work_s


def order(trace: list[str]) -> list[str]:
    """The jobs in the order in which they stood last."""
    return sorted(set(trace), key=lambda name: len(trace) - trace[::-1].index(name))


def test_the_shortest_goes_first_and_equals_in_order_of_arrival() -> None:
    made = device()
    for name, side in (("long", 1024), ("a", 256), ("middle", 512), ("b", 256)):
        made.scheduler.admit(make(name, side))
    made.run()
    assert order(made.trace) == ["a", "b", "middle", "long"]


def test_a_short_job_passes_a_long_one_at_its_next_step() -> None:
    made = device()
    long, short = make("long", 512, steps=50), make("short", 256)
    made.scheduler.admit(long)
    for _ in range(20):
        made.step()
    accepted_s = made.clock.now_s
    made.scheduler.admit(short)
    made.run()
    assert made.ended[short][1] - accepted_s <= work_s(short) + STEP_S[512]
    # The long one went on where it stood, and did no slice twice.
    assert made.trace.count("long") == len(list(slices_of(long.resolved)))
    assert made.trace[20:26] == ["short"] * 6


def test_a_job_that_is_nearly_done_is_not_passed() -> None:
    made = device()
    made.scheduler.admit(make("long", 512, steps=50))
    for _ in range(51):
        made.step()
    made.scheduler.admit(make("short", 256))
    made.run()
    assert order(made.trace) == ["long", "short"]


def test_the_oldest_gets_its_share_while_shorter_jobs_keep_coming() -> None:
    made = device()
    long = make("long", 512, steps=50)
    made.scheduler.admit(long)
    made.step()
    began_s, number = made.clock.now_s, itertools.count()
    while long not in made.ended:
        while made.scheduler.depth < 3:
            made.scheduler.admit(make(f"short {next(number)}", 256))
        made.step()
    took_s = made.clock.now_s - began_s
    assert took_s <= (work_s(long) + OLDEST_LEAD_S) / OLDEST_SHARE + STEP_S[512]
    # And no more than that: the others had the rest.
    assert took_s >= work_s(long) / OLDEST_SHARE * 0.8


@pytest.mark.parametrize(("first", "then"), [("batch", "normal"), ("normal", "interactive")])
def test_a_better_class_goes_first_whatever_its_length(first: str, then: str) -> None:
    made = device()
    made.scheduler.admit(make("worse", 256, steps=20, priority=Priority(first)))
    made.step()
    made.scheduler.admit(make("better", 512, steps=10, priority=Priority(then)))
    made.run()
    assert order(made.trace) == ["better", "worse"]
    assert made.trace[1:12] == ["better"] * 11


def test_a_client_with_many_jobs_does_not_shut_out_another() -> None:
    made = device()
    for i in range(20):
        made.scheduler.admit(make(f"flood {i}", 512, client="flood"))
    for _ in range(30):
        made.step()
    other = make("other", 512, client="other")
    accepted_s = made.clock.now_s
    made.scheduler.admit(other)
    made.run()
    # Behind the job that runs, and at most one more by the share of the oldest.
    assert made.ended[other][1] - accepted_s <= 3 * work_s(other) + STEP_S[512]


def test_two_clients_that_both_want_more_get_half_each() -> None:
    made = device()
    number = itertools.count()
    waiting = {"small": 256, "large": 512}
    served = dict.fromkeys(waiting, 0.0)
    jobs: dict[str, Job] = {}
    for _ in range(3000):
        for client, side in waiting.items():
            if client not in jobs or jobs[client] in made.ended:
                jobs[client] = make(f"{client} {next(number)}", side, client=client)
                made.scheduler.admit(jobs[client])
        before_s = made.clock.now_s
        made.step()
        served[made.trace[-1].split()[0]] += made.clock.now_s - before_s
    assert 0.5 <= served["small"] / served["large"] <= 2


def test_a_near_deadline_brings_a_job_forward_and_a_missed_one_ends_it() -> None:
    made = device()
    made.scheduler.admit(make("a", 512, steps=4))
    made.step()
    plain = make("plain", 512, steps=6)
    urgent = make("urgent", 512, steps=8, deadline_s=14.0)
    missed = make("missed", 1024, deadline_s=3.0)
    for job in (plain, urgent, missed):
        made.scheduler.admit(job)
    made.run()
    assert order([name for name in made.trace if name != "missed"]) == ["a", "urgent", "plain"]
    assert made.ended[urgent][0] == "completed"
    how, when_s = made.ended[missed]
    assert how == JobTimeoutError.code
    assert "missed" not in made.trace
    assert when_s <= 1000 + 3600


def test_a_running_job_ends_at_its_deadline() -> None:
    made = device()
    job = make("late", 512, steps=50, deadline_s=10.0)
    made.scheduler.admit(job)
    accepted_s = made.clock.now_s
    made.run()
    assert made.ended[job][0] == JobTimeoutError.code
    assert 10.0 <= made.ended[job][1] - accepted_s <= 10.0 + STEP_S[512]


def test_a_cancelled_job_in_flight_ends_at_the_next_turn_of_anyone() -> None:
    made = device()
    long, short = make("long", 512, steps=50), make("short", 256)
    made.scheduler.admit(long)
    made.step()
    made.scheduler.admit(short)
    made.step()
    assert made.trace == ["long", "short"]
    long.cancel(ClientLeftError("gone"))
    made.step()
    assert made.ended[long][0] == ClientLeftError.code
    assert made.trace == ["long", "short"]


def test_a_cancelled_job_counts_as_no_more_than_its_slice_in_hand() -> None:
    made = device(Limits(jobs=100, work_s=40.0))
    running, waiting = make("running", 512, steps=30), make("waiting", 512, steps=20)
    made.scheduler.admit(running)
    made.step()
    made.scheduler.admit(waiting)
    assert refused(made, make("a", 512, steps=12)).bound == "work"
    running.cancel(ClientLeftError("gone"))
    assert made.scheduler.work_s == pytest.approx(work_s(waiting) + STEP_S[512], rel=0.1)
    made.scheduler.admit(make("a", 512, steps=12))


def test_a_job_counts_as_no_more_than_it_can_do_until_its_deadline() -> None:
    made = device(Limits(jobs=100, work_s=40.0))
    made.scheduler.admit(make("running", 512, steps=30, deadline_s=5.0))
    made.step()
    assert made.scheduler.work_s == pytest.approx(5.0, abs=0.2)
    waiting = make("waiting", 512, steps=30, deadline_s=8.0)
    made.scheduler.admit(waiting)
    assert made.scheduler.work_s == pytest.approx(13.0, abs=0.2)
    behind = make("behind", 512, steps=40)
    made.scheduler.admit(behind)
    place = behind.place()
    assert place is not None and place.eta_s == pytest.approx(13.0, abs=0.2)


def test_no_more_jobs_are_in_flight_than_allowed() -> None:
    made = device(Limits(jobs=1000, work_s=1e6, in_flight=2))
    for name, steps in (("a", 50), ("b", 20), ("c", 4)):
        made.scheduler.admit(make(name, 512, steps=steps))
        made.step()
    assert len(made.scheduler.active) == 2 and made.scheduler.depth == 1
    # One that is being packed counts, too.
    made.scheduler.packing(+1)
    for job in made.scheduler.active:
        job.cancel(ClientLeftError("gone"))
    made.step()
    made.step()
    assert made.scheduler.in_flight == 1
    made.scheduler.packing(+1)
    assert made.scheduler.poll() is None
    made.scheduler.packing(-1)
    made.run()
    assert {job.request_id for job, (how, _) in made.ended.items() if how == "completed"} == {"c"}


def test_closing_hands_back_what_waits_and_lets_the_rest_end() -> None:
    made = device()
    running, waiting = make("running", 512), make("waiting", 512)
    made.scheduler.admit(running)
    made.step()
    made.scheduler.admit(waiting)
    assert made.scheduler.close() == [waiting]
    assert made.scheduler.admit(make("late")) is False
    made.run()
    assert made.ended[running][0] == "completed"
    assert made.scheduler.take() is None
