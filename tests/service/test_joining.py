"""Which jobs take their steps as one: the rule alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
from PIL import Image

from app.engine.costs import Unit, WorkLeft
from app.engine.jobs import Priority
from app.engine.joining import COUNTS, LIKENESSES_KEPT, Joining, likeness
from app.engine.policy import Entry, Policy
from app.errors import ClientLeftError
from fluxcore.params import GenerationParams
from fluxcore.pipeline import joint_steps
from tests.service.fake_pipeline import FakePipeline
from tests.service.simulated_device import device, make

# --- how many ----------------------------------------------------------------


def orders(alike: int) -> Iterator[tuple[int, ...]]:
    """All ways to take so many jobs one after the other, some as one."""
    if alike == 0:
        yield ()
    for count in (1, *COUNTS):
        if count <= alike:
            yield from ((count, *rest) for rest in orders(alike - count))


def waits(order: Sequence[int], jobs: int, share: dict[int, float]) -> float:
    """The sum of all jobs' times until they are done, the unlike ones coming last."""
    now = total = 0.0
    for count in (*order, *[1] * (jobs - sum(order))):
        now += count * share[count]
        total += count * now
    return total


@pytest.mark.parametrize("alike", range(1, 9))
def test_as_many_are_joined_as_make_the_sum_of_waits_least(alike: int) -> None:
    for of_two, of_four in product((0.5, 0.7, 0.87, 0.95, 1.0), (0.4, 0.6, 0.865, 1.0)):
        joining, share = Joining(), {1: 1.0, 2: of_two, 4: of_four}
        for count in COUNTS:
            joining.learned("a", count, share[count])
        for jobs in (alike, alike + 1, alike + 5, alike + 40):
            found = joining.best("a", alike, jobs)
            least = min(waits(order, jobs, share) for order in orders(alike))
            so = min(waits(o, jobs, share) for o in orders(alike) if o[0] == found)
            assert so == pytest.approx(least), (jobs, share)


def test_two_are_joined_only_when_enough_wait() -> None:
    joining = Joining()
    joining.learned("a", 2, 0.87)
    joining.learned("a", 4, 0.865)
    assert [joining.best("a", 2, jobs) for jobs in range(2, 7)] == [1, 1, 2, 2, 2]
    # Four save so little more than two that the first of them wait too long.
    assert [joining.best("a", 4, jobs) for jobs in (4, 20, 100)] == [2, 2, 2]
    joining.learned("a", 4, 0.5)
    assert joining.best("a", 4, 4) == 4
    assert joining.best("a", 1, 100) == 1


def test_what_is_not_known_is_tried_once_and_what_does_not_pay_is_not_joined() -> None:
    joining = Joining()
    assert joining.best("a", 2, 2) == 1  # no hope makes that worth while
    assert joining.best("a", 2, 8) == 2 and joining.is_untried("a", 2)
    joining.learned("a", 2, 1.0)
    assert not joining.is_untried("a", 2)
    assert joining.best("a", 2, 100) == 1
    assert joining.best("b", 2, 100) == 2


def test_jobs_are_joined_by_as_many_as_calls_are() -> None:
    assert COUNTS == joint_steps.COUNTS


def test_who_gains_nothing_is_not_looked_for() -> None:
    joining = Joining()
    assert joining.may_pay("a size")
    joining.learned("a size", 2, 1.0)
    assert joining.may_pay("a size")
    joining.learned("a size", 4, 1.0)
    assert not joining.may_pay("a size")


def test_few_likenesses_are_remembered() -> None:
    joining = Joining()
    for kind in range(2 * LIKENESSES_KEPT):
        for count in COUNTS:
            joining.learned(kind, count, 0.9)
    assert len(joining._shares) == LIKENESSES_KEPT * len(COUNTS)
    assert joining.is_untried(0, 2) and not joining.is_untried(2 * LIKENESSES_KEPT - 1, 2)


def test_likeness_is_all_that_shapes_a_step_depend_on() -> None:
    def kind(**given: Any) -> object:
        params = GenerationParams(**{"prompt": "x", "width": 64, "height": 64, **given})
        return likeness(params, FakePipeline().prepare(params).params)

    picture, wide = Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))
    assert kind() == kind(prompt="y", seed=3, power_alpha=3.0) is not None
    assert kind(guidance=2.0) == kind(guidance=3.0)
    assert kind(n=2) is None
    different = [
        {},
        {"width": 96},
        {"steps": 5},
        {"schedule": "linear"},
        {"schedule": "power"},
        {"schedule": "power", "power_alpha": 3.0},
        {"guidance": 3.0},
        {"references": (picture,)},
        {"references": (wide,)},
        {"references": (picture, picture)},
    ]
    assert len({kind(**given) for given in different}) == len(different)


# --- who ---------------------------------------------------------------------


@dataclass
class Scene:
    """Entries of a policy, at a given number of steps to go, of 4; None before their prompt."""

    policy: Policy = field(default_factory=Policy)
    waiting: list[Entry] = field(default_factory=list)
    active: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        for unit, took_s in ((Unit("text", 1), 0.1), (Unit("denoise", 768), 1.0)):
            self.policy.costs.observe(unit, took_s)
        self.policy.costs.observe(Unit("decode", 256 * 256), 0.1)

    def add(
        self, to_go: int | None = 4, *, is_active: bool = True, kind: object = "a", **options: Any
    ) -> Entry:
        job = make(f"job {len(self.waiting) + len(self.active)}", **options)
        left = WorkLeft(job.params, job.resolved, 0)
        if to_go is not None:
            left.done("text")
            for _ in range(4 - to_go):
                left.done("denoise")
        self.policy.shares.joined(job.options.client)
        number = len(self.waiting) + len(self.active)
        entry = Entry(job, number, left, job.options.deadline_s, kind, is_active)
        (self.active if is_active else self.waiting).append(entry)
        return entry

    def others(self, count: int) -> None:
        """Jobs that cannot go along."""
        for _ in range(count):
            self.add(None, is_active=False, kind=None, side=512)

    def company(self, chosen: Entry, may_start: int = 8) -> list[Entry]:
        return self.policy.company(chosen, self.waiting, self.active, 0.0, may_start=may_start)


def test_those_at_the_same_step_go_along() -> None:
    scene = Scene()
    chosen, same, behind = scene.add(3), scene.add(3), scene.add(2)
    scene.others(8)
    assert scene.company(chosen) == [same]
    assert scene.company(same) == [chosen]
    assert scene.company(behind) == []


@pytest.mark.parametrize(
    "differs",
    [{"kind": "b"}, {"kind": None}, {"priority": Priority.BATCH}, {"deadline_s": 5.0}],
)
def test_those_who_differ_do_not(differs: dict[str, Any]) -> None:
    scene = Scene()
    chosen, other = scene.add(), scene.add(**differs)
    scene.others(8)
    assert scene.company(chosen) == []
    assert other not in scene.company(chosen)


def test_one_that_is_to_stop_does_not_go_along() -> None:
    scene = Scene()
    chosen, leaving = scene.add(), scene.add()
    scene.others(8)
    assert scene.company(chosen) == [leaving]
    leaving.job.cancel(ClientLeftError("gone"))
    assert scene.company(chosen) == []


def test_one_whose_deadline_is_near_is_not_slowed_and_one_whose_is_far_goes_along() -> None:
    for deadline_s, goes in ((5.0, False), (20.0, True)):
        scene = Scene()
        chosen, other = scene.add(deadline_s=deadline_s), scene.add()
        scene.others(8)
        assert scene.company(chosen) == ([other] if goes else [])


def test_those_who_wait_are_brought_along_to_the_first_step_only() -> None:
    scene = Scene()
    chosen, late = scene.add(4), scene.add(None, is_active=False)
    scene.others(8)
    assert scene.company(chosen) == [late]
    # A place is left for a shorter one.
    assert scene.company(chosen, may_start=1) == []
    assert scene.company(chosen, may_start=2) == [late]
    scene = Scene()
    chosen, late = scene.add(3), scene.add(None, is_active=False)
    scene.others(8)
    assert scene.company(chosen) == []


def test_those_who_are_there_go_before_those_who_must_be_fetched() -> None:
    scene = Scene()
    fetched = scene.add(None, is_active=False)
    chosen, there = scene.add(4), scene.add(4)
    scene.others(8)
    scene.policy.joining.learned("a", 4, 1.0)
    assert scene.company(chosen) == [there]
    assert fetched.left.steps is None


def test_the_oldest_waits_for_nobody_while_it_is_owed_its_share() -> None:
    scene = Scene()
    oldest, _ = scene.add(4), scene.add(None, is_active=False)
    scene.others(8)
    assert scene.policy.choose(scene.waiting, scene.active, 0.0, may_start=True) is not None
    assert len(scene.company(oldest)) == 1
    other = scene.waiting[-1]
    for _ in range(5):
        scene.policy.served(other, 1.0)
    assert scene.company(oldest) == []


def test_a_client_that_has_had_more_does_not_go_along_at_the_cost_of_another() -> None:
    scene = Scene()
    chosen, greedy = scene.add(client="modest"), scene.add(client="greedy")
    scene.others(8)
    assert scene.company(chosen) == [greedy]
    scene.policy.shares.served("greedy", 20.0)
    assert scene.company(chosen) == []
    assert scene.company(greedy) == [chosen]


def test_a_job_is_alone_while_no_other_waits_or_has_begun() -> None:
    scheduler = device().scheduler
    assert not scheduler.is_alone, "there is none"
    first, second = make("first"), make("second")
    scheduler.admit(first)
    assert scheduler.is_alone
    turn = scheduler.poll()
    assert turn is not None and turn.job is first and scheduler.is_alone
    scheduler.admit(second)
    assert not scheduler.is_alone
    scheduler.finished(first)
    assert scheduler.is_alone
