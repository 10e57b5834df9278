"""The scheduler under many jobs at once: no loss, no starvation, and steps taken as one."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from app.engine.admission import LARGEST_SHARE, LONGEST_WAIT_S, Limits
from app.engine.jobs import Job, Priority
from app.engine.joining import COUNTS, LIKENESSES_KEPT
from app.engine.policy import OLDEST_LEAD_S, OLDEST_SHARE, Entry
from app.engine.scheduler import Turn
from app.errors import ClientLeftError, JobTimeoutError, QueueFullError
from tests.service.fake_pipeline import slices_of
from tests.service.simulated_device import STEP_S, Device, device, make, wait_s, work_s


@dataclass
class Oracle:
    """Checks each turn against the rules, from what a client can know."""

    made: Device
    limits: Limits

    def check(self) -> None:
        scheduler = self.made.scheduler
        assert scheduler.in_flight <= self.limits.in_flight
        assert scheduler.depth <= self.limits.jobs * 5 // 4
        waiting = list(scheduler._waiting.values())
        most = LARGEST_SHARE * self.limits.pixels
        pixels = sum(min(entry.left.pixels, most) for entry in waiting)
        assert len(waiting) <= 1 or pixels <= self.limits.pixels

    def judge(self, turn: Turn) -> None:
        """The chosen job is the oldest, or nobody stands clearly before it.

        Or it is fetched for one of which that holds, to take its steps with it.
        """
        scheduler = self.made.scheduler
        if turn.end is not None or turn.trial is not None:
            return
        entries = {**scheduler._active, **scheduler._waiting}
        served = entries[turn.job]
        fetched_for = [
            entry
            for entry in scheduler._active.values()
            if served.left.steps is None
            and entry.left.steps == entry.left.all_steps
            and (entry.likeness, entry.job.options.priority)
            == (served.likeness, served.job.options.priority)
            and served.likeness is not None
        ]
        is_full = scheduler.in_flight >= self.limits.in_flight
        in_play = [entry for entry in entries.values() if entry.is_active or not is_full]
        assert any(self._may_go(entry, in_play) for entry in (served, *fetched_for))

    def _may_go(self, chosen: Entry, in_play: list[Entry]) -> bool:
        rivals = [entry for entry in in_play if entry is not chosen]
        if all(chosen.sequence < rival.sequence for rival in rivals):
            return True
        rank = list(Priority).index
        own, policy = rank(chosen.job.options.priority), self.made.scheduler._policy
        for rival in rivals:
            other = rank(rival.job.options.priority)
            # A near deadline is worth more than being short.
            is_comparable = other == own and rival.is_active and chosen.deadline_s is None
            is_shorter = policy.remaining_s(rival) < policy.remaining_s(chosen) - 1e-9
            if other < own or (is_comparable and is_shorter):
                return False
        return True


@pytest.mark.parametrize(
    ("seed", "shares"),
    [
        *((seed, None) for seed in range(6)),
        (6, {2: 0.87, 4: 0.865}),
        (7, {2: 0.6, 4: 0.4}),
        (8, {2: 0.75, 4: 1.0}),
        (9, {2: 0.95, 4: 1.0}),
    ],
)
def test_thousands_of_jobs_with_cancels_and_failures(
    seed: int, shares: dict[int, float] | None
) -> None:
    """No loss, no duplicate, no starvation, order by policy, memory bounded."""
    chance = random.Random(seed)
    limits = Limits(jobs=24, pixels=20_000_000, work_s=300.0, in_flight=4)
    made = device(limits, shares=shares)
    made.noise = lambda: chance.uniform(0.7, 1.4)
    made.fails = lambda job: chance.random() < 0.004
    oracle = Oracle(made, limits)
    clock = made.clock
    accepted: dict[Job, float] = {}
    ahead_s: dict[Job, float] = {}
    removed: set[Job] = set()
    refusals = 0
    next_arrival_s = clock.now_s
    for number in range(1500):
        # Bursts and lulls; now and then the queue runs empty.
        next_arrival_s += chance.expovariate(1.0) * chance.choice([0.2, 2.0, 6.0])
        while clock.now_s < next_arrival_s:
            turn = made.scheduler.poll()
            if turn is None:
                clock.now_s = next_arrival_s
                break
            oracle.judge(turn)
            made.take(turn)
            oracle.check()
        job = make(
            f"job {number}",
            chance.choices([256, 512, 1024], [6, 3, 1])[0],
            steps=chance.choice([1, 4, 4, 8, 20]),
            n=chance.choice([1, 1, 1, 2]),
            priority=chance.choice(list(Priority)),
            client=chance.choice("abcd"),
            deadline_s=chance.choice([None, None, None, 40.0, 200.0]),
        )
        try:
            assert made.scheduler.admit(job)
        except QueueFullError as error:
            assert 0 < wait_s(error) <= LONGEST_WAIT_S
            refusals += 1
            continue
        accepted[job] = clock.now_s
        pending = [other for other in accepted if other not in made.ended and other not in removed]
        ahead_s[job] = sum(work_s(other) for other in pending)
        oracle.check()
        if chance.random() < 0.3:
            victim = chance.choice(pending)
            victim.cancel(ClientLeftError("gone"))
            if made.scheduler.remove(victim):
                removed.add(victim)
    while (turn := made.scheduler.poll()) is not None:
        oracle.judge(turn)
        made.take(turn)

    assert refusals > 20
    assert (shares is None) == (not made.joint)
    assert len(made.scheduler._policy.joining._shares) <= LIKENESSES_KEPT * len(COUNTS)
    assert set(made.ended) | removed == set(accepted)
    assert not set(made.ended) & removed
    assert made.scheduler.depth == made.scheduler.in_flight == 0
    ends = [how for how, _ in made.ended.values()]
    assert ends.count("completed") > 300
    assert {"completed", "failed", ClientLeftError.code, JobTimeoutError.code} == set(ends)
    # A completed job had every slice exactly once, any other no more than that.
    for job, (how, when_s) in made.ended.items():
        wanted = len(list(slices_of(job.resolved)))
        had = made.trace.count(job.request_id)
        assert had == wanted if how == "completed" else had <= wanted
        # While it is the oldest it has its share; before, those accepted earlier had theirs.
        slack_s = (OLDEST_LEAD_S + 6.0) / OLDEST_SHARE + limits.in_flight * 210.0
        assert when_s - accepted[job] <= 1.4 * ahead_s[job] / OLDEST_SHARE + slack_s


@pytest.mark.parametrize("shares", [{2: 0.87, 4: 1.0}, {2: 0.87, 4: 0.5}, {2: 1.0, 4: 1.0}])
def test_saturation_is_drawn_in_as_much_less_time_as_the_shares_promise(
    shares: dict[int, float],
) -> None:
    took_s = {}
    for joins in (False, True):
        made = device(shares=shares if joins else None)
        for i in range(100):
            made.scheduler.admit(make(f"job {i}", 256))
        began_s = made.clock.now_s
        made.run()
        took_s[joins] = made.clock.now_s - began_s - made.trials * made.trial_s
        assert made.trials <= len(COUNTS)
        # In order of arrival, but for those who go together.
        done = [job.request_id for job in sorted(made.ended, key=lambda j: made.ended[j][1])]
        places = {name: place for place, name in enumerate(done)}
        assert all(abs(places[f"job {i}"] - i) < max(COUNTS) for i in range(100))
    steps_s = 100 * 4 * STEP_S[256]
    saved = (took_s[False] - took_s[True]) / steps_s
    most = 1 - min(shares.values())
    # The last few are too few to be joined.
    assert 0.9 * most <= saved <= most + 1e-9


def test_a_client_with_few_jobs_is_not_held_up_by_those_of_another_that_go_together() -> None:
    slowest_s = {}
    for shares in (None, {2: 0.87, 4: 0.865}):
        made = device(shares=shares)
        for i in range(100):
            made.scheduler.admit(make(f"flood {i}", 256, client="flood"))
        for _ in range(50):
            made.step()
        few = [make(f"few {i}", 256, client="few") for i in range(3)]
        accepted_s = made.clock.now_s
        for job in few:
            made.scheduler.admit(job)
        made.run()
        slowest_s[shares is None] = max(made.ended[job][1] for job in few) - accepted_s
    assert slowest_s[False] <= slowest_s[True] + 2 * work_s(make(side=256))


def test_jobs_that_keep_coming_and_going_do_not_hold_up_the_one_that_waits_for_them() -> None:
    """Each is fetched to go along, and is gone once its prompt is encoded."""
    made = device(shares={2: 0.5, 4: 0.5})
    patient = make("patient", 256)
    made.scheduler.admit(patient)
    made.step()
    for i in range(4):
        made.scheduler.admit(make(f"behind {i}", 512))
    for number in range(2000):
        if patient in made.ended:
            break
        coming = make(f"coming {number}", 256)
        made.scheduler.admit(coming)
        made.step()
        coming.cancel(ClientLeftError("gone"))
        made.scheduler.remove(coming)
    assert made.ended[patient][0] == "completed"


def test_a_place_is_left_for_a_shorter_job() -> None:
    made = device(Limits(jobs=100, work_s=1e6, in_flight=3), shares={2: 0.5, 4: 0.5})
    for i in range(8):
        made.scheduler.admit(make(f"job {i}", 256, steps=20))
    for _ in range(12):
        made.step()
    assert made.joint and len(made.scheduler.active) == 2
    urgent = make("urgent", 256, steps=1, priority=Priority.INTERACTIVE)
    made.scheduler.admit(urgent)
    made.step()
    assert made.trace[-1] == "urgent"
