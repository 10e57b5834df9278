"""Which jobs take their steps as one: the rule alone, then the engine around a fake pipeline."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.engine import Packing, flight, worker
from app.engine.costs import Unit, WorkLeft
from app.engine.events import StepDone
from app.engine.flight import Flight
from app.engine.jobs import Job, Priority
from app.engine.joining import COUNTS, LIKENESSES_KEPT, Joining, likeness
from app.engine.policy import Entry, Policy
from app.errors import ClientLeftError
from app.main import pipeline_loader
from app.metrics import Metrics
from app.telemetry import configure_logging
from fluxcore import FluxPipeline
from fluxcore.errors import DeviceFaultError, OutOfMemoryError
from fluxcore.params import GenerationParams
from fluxcore.pipeline.joint_steps import JointSteps
from tests.service.conftest import Live, StartLive, settings_for_tests, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice
from tests.service.test_policy import make

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


# --- the engine around it ----------------------------------------------------


class JointRun:
    """A fake pipeline's run that knows its prompt."""

    def __init__(self, prompt: str, slices: Iterator[FakeSlice]) -> None:
        self.prompt = prompt
        self._slices = slices

    def __next__(self) -> FakeSlice:
        return next(self._slices)

    def close(self) -> None:
        self._slices.close()  # type: ignore[attr-defined]


@dataclass
class JointPipeline(FakePipeline):
    """Notes what it was asked to do together, and does as it is told.

    Attributes:
        gain: what ``share`` says.
        together, tried: prompts, and how many.
        trouble: raised by the next joint step.
        alike: whether jobs are, when it comes to it.
        holding: joint steps wait while it is closed.
    """

    gain: float = 0.5
    together: list[tuple[str, ...]] = field(default_factory=list)
    tried: list[tuple[str, int]] = field(default_factory=list)
    trouble: Exception | None = None
    trial_trouble: Exception | None = None
    trial_s: float = 0.0
    alike: bool = True
    holding: threading.Event = field(default_factory=threading.Event)
    in_joint: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.holding.set()

    def run(self, params: GenerationParams) -> Any:
        return JointRun(params.prompt, super().run(params))

    def share(self, run: Any, count: int) -> float:
        self.tried.append((run.prompt, count))
        trouble, self.trial_trouble = self.trial_trouble, None
        if trouble is not None:
            raise trouble
        time.sleep(self.trial_s if len(self.tried) == 1 else 0.0)
        return self.gain

    def begin_together(self, runs: Sequence[Any]) -> bool:
        if self.alike:
            self.together.append(tuple(run.prompt for run in runs))
        self.in_joint.set()
        assert self.holding.wait(30)
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble
        return self.alike


FULL = [f"job {i}" for i in range(4)]


def crowd(live: Live, prompts: Sequence[str] = FULL, **given: Any) -> list[Any]:
    """Jobs that all wait until the first of them may run."""
    live.pipeline.close_gate()
    later = []
    for number, prompt in enumerate(prompts):
        later.append(live.generate_later(prompt, **{"steps": 2, **given}))
        if number == 0:
            assert live.pipeline.started.wait(30)
        else:
            wait_until(lambda number=number: live.depth == number)
    live.pipeline.gate.set()
    return later


def figure(live: Live, name: str) -> float:
    with live.client() as client:
        text = client.get("/metrics").text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def answers(later: Sequence[Any]) -> list[httpx2.Response]:
    return [one.answer() for one in later]


@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_jobs_that_gain_by_it_are_drawn_together(start_live: StartLive, batching: str) -> None:
    pipeline = JointPipeline()
    stream = io.StringIO()
    live = start_live(pipeline, settings={"batching": batching})
    configure_logging("info", "json", stream)
    assert [a.status_code for a in answers(crowd(live))] == [200] * 4
    assert pipeline.together == [("job 0", "job 1")] * 2 + [("job 2", "job 3")] * 2
    # Once for the trial, and after each joint step.
    assert pipeline.tried == [("job 0", 2)] * 3 + [("job 2", 2)] * 2
    # Each had each of its slices once.
    for prompt in FULL:
        stages = [slice_[1:] for slice_ in pipeline.slices if slice_[0] == prompt]
        assert stages == [("text", 0, 0), ("denoise", 0, 1), ("denoise", 0, 2), ("decode", 0, 2)]
    assert figure(live, "fluxd_joint_steps_total") == 8
    wait_until(lambda: stream.getvalue().count("job done") == 4)
    ids = re.findall(
        r'"request_id": "([^"]+)"[^\n]*job done|job done[^\n]*"request_id": "([^"]+)"',
        stream.getvalue(),
    )
    assert len({one or other for one, other in ids}) == 4


def test_batching_can_be_turned_off(start_live: StartLive) -> None:
    pipeline = JointPipeline()
    live = start_live(pipeline, settings={"batching": "off"})
    assert [a.status_code for a in answers(crowd(live))] == [200] * 4
    assert pipeline.together == pipeline.tried == []


def test_what_gains_nothing_is_tried_once(start_live: StartLive) -> None:
    pipeline = JointPipeline(gain=1.0)
    live = start_live(pipeline)
    for _ in range(2):
        assert [a.status_code for a in answers(crowd(live))] == [200] * 4
    assert pipeline.together == []
    assert pipeline.tried == [("job 0", 2)]


def test_jobs_that_differ_after_all_take_their_own_steps(start_live: StartLive) -> None:
    pipeline = JointPipeline(alike=False)
    live = start_live(pipeline)
    assert [a.status_code for a in answers(crowd(live))] == [200] * 4
    assert pipeline.together == [] and pipeline.in_joint.is_set()
    assert figure(live, "fluxd_joint_steps_total") == 0


def test_steps_that_no_longer_gain_are_joined_no_more(start_live: StartLive) -> None:
    pipeline = JointPipeline()
    live = start_live(pipeline)
    answers(crowd(live))
    pipeline.together.clear()
    pipeline.gain = 1.0  # what the pipeline says once memory was full
    answers(crowd(live))
    assert len(pipeline.together) == 1
    pipeline.together.clear()
    assert [a.status_code for a in answers(crowd(live))] == [200] * 4
    assert pipeline.together == []


def test_each_is_told_its_own_steps_and_previews(start_live: StartLive) -> None:
    pipeline = JointPipeline()
    live = start_live(pipeline)
    later = crowd(live, steps=3, stream=True, previews=1)
    for answer in answers(later):
        assert answer.status_code == 200
        events = re.findall(r"^event: (\w+)$", answer.text, re.MULTILINE)
        assert next(e for e in events if e != "queued") == "started"
        assert [events.count(e) for e in ("preview", "completed")] == [1, 1]
        # One who does not keep up misses steps, but never the last.
        percent = [float(found) for found in re.findall(r'"percent":\s*([\d.]+)', answer.text)]
        assert percent == sorted(percent) and percent[-1] == 100.0
    assert len(pipeline.together) == 6


class SideBySide(FakePipeline):
    """Draws the two pictures of a job in the same slices."""

    def run(self, params: GenerationParams) -> Any:
        plain = [done for done in super().run(params) if done.stage == "denoise"]
        by_step = sorted(plain, key=lambda done: (done.step, done.image_index))
        for done in by_step:
            yield replace(done, has_more=done.image_index == 0)
        size = (params.width or 64, params.height or 64)
        return FakeResult([Image.new("RGB", size)] * 2, [0, 1], {}, [], self.prepare(params).params)


def test_pictures_drawn_side_by_side_are_one_slice_and_one_progress(start_live: StartLive) -> None:
    live = start_live(SideBySide())
    job = live.engine.submit(GenerationParams(prompt="x", n=2, steps=2), Packing(), "x")
    seen: list[object] = []
    job.watch(seen.append)
    job.future.result(30)
    told = [event for event in seen if isinstance(event, StepDone)]
    assert [(e.image_index, e.step, e.of_all) for e in told] == [
        (0, 1, 1),
        (1, 1, 2),
        (0, 2, 3),
        (1, 2, 4),
    ][-len(told) :]
    assert told
    assert figure(live, "fluxd_joint_steps_total") == 4
    assert figure(live, "fluxd_steps_total") == 4


def test_the_times_of_each_hold_the_joint_steps_and_the_trial(start_live: StartLive) -> None:
    pipeline = JointPipeline(trial_s=0.2)
    live = start_live(pipeline)
    pipeline.holding.clear()
    later = crowd(live)
    assert pipeline.in_joint.wait(30)
    time.sleep(0.2)
    pipeline.holding.set()
    first, second, third, _ = (answer.json()["timings"] for answer in answers(later))
    # Those who took part worked meanwhile; who waited had not begun.
    for times in (first, second):
        assert times["paused_ms"] <= times["total_ms"] - times["queue_ms"] - 200
    assert first["paused_ms"] <= first["total_ms"] - first["queue_ms"] - 400
    assert third["queue_ms"] >= 200


def test_one_whose_client_leaves_stops_and_the_others_go_on(start_live: StartLive) -> None:
    pipeline = JointPipeline()
    live = start_live(pipeline)
    pipeline.holding.clear()
    later = crowd(live, steps=3)
    assert pipeline.in_joint.wait(30)
    victim = next(job for job in live.engine._scheduler.active if job.params.prompt == "job 1")
    live.engine.cancel(victim, ClientLeftError("gone"))
    pipeline.holding.set()
    codes = [answer.status_code for answer in answers(later)]
    assert [code == 200 for code in codes] == [True, False, True, True]
    assert pipeline.abandoned == ["job 1"]
    # The step in hand was its last.
    assert [s[3] for s in pipeline.slices if s[0] == "job 1"] == [0, 1]
    assert "job 1" in pipeline.together[0]
    assert all("job 1" not in prompts for prompts in pipeline.together[1:])


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (RuntimeError("a bug in /secret/path"), "internal_error"),
        (OutOfMemoryError("too little"), "out_of_memory"),
        (DeviceFaultError("one constant colour"), "device_fault"),
    ],
)
def test_trouble_in_a_joint_step_is_told_to_each_of_them(
    start_live: StartLive, trouble: Exception, code: str
) -> None:
    pipeline = JointPipeline(trouble=trouble)
    live = start_live(pipeline)
    found = answers(crowd(live))
    assert [answer.json()["error"]["code"] for answer in found[:2]] == [code] * 2
    assert "secret" not in found[0].text + found[1].text
    assert [answer.status_code for answer in found[2:]] == [200] * 2
    assert pipeline.abandoned == ["job 0", "job 1"], "a run was kept"
    assert (pipeline.runtime.released > 0) == isinstance(trouble, OutOfMemoryError)
    wait_until(lambda: not live.engine._scheduler.active and not live.engine._worker._flights)
    # The next job works.
    assert live.generate("after").status_code == 200
    assert live.engine.status().is_alive


def test_trouble_in_a_trial_ends_the_job_that_made_it_and_no_other(start_live: StartLive) -> None:
    pipeline = JointPipeline(trial_trouble=OutOfMemoryError("too little"))
    live = start_live(pipeline)
    codes = [answer.status_code for answer in answers(crowd(live))]
    assert [code == 200 for code in codes].count(False) == 1
    assert len(pipeline.abandoned) == 1
    assert pipeline.runtime.released == 1


def test_a_joint_step_may_take_as_long_as_all_of_its_steps(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it counts as stuck."""
    pipeline = JointPipeline()
    live = start_live(pipeline)
    pipeline.holding.clear()
    later = crowd(live)
    assert pipeline.in_joint.wait(30)
    began = live.engine._worker._slice_began
    assert began is not None and began[1] is not None
    job = live.engine._scheduler.active[0]
    one_s = live.engine._scheduler.expected_s(job)
    assert one_s is not None
    assert began[1] == pytest.approx(2 * one_s, rel=0.01)
    monkeypatch.setattr(worker, "LEAST_STALL_S", 0.0)
    monkeypatch.setattr(worker, "STALL_FACTOR", 0.0)
    assert live.engine._worker.is_stalled
    pipeline.holding.set()
    answers(later)


@dataclass
class Ledger:
    """Stands in for the scheduler: what each slice was said to have taken."""

    told: list[tuple[str, float]] = field(default_factory=list)

    def slice_done(self, job: Job, stage: str, took_s: float) -> None:
        self.told.append((stage, took_s))


def test_a_job_is_charged_its_part_of_a_joint_step_and_each_picture_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a client would pay for its neighbours, and a step would seem to take longer."""
    now = iter(range(100))
    monkeypatch.setattr(flight, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    ledger, metrics = Ledger(), Metrics()
    one = Flight(make("one"), JointPipeline(), ledger, metrics)  # type: ignore[arg-type]
    one.advance()
    one.advance(joint_s=8.0, jobs=4)
    # A second passes from the beginning to the end of a slice.
    assert ledger.told == [("text", 1.0), ("denoise", 8.0 / 4 + 1.0)]
    assert one.times.own_s >= 8.0
    ledger.told.clear()
    two = Flight(make("two", n=2), SideBySide(), ledger, metrics)  # type: ignore[arg-type]
    two.advance()
    assert ledger.told == [("denoise", 0.5)] * 2


# --- the bundled model -------------------------------------------------------


@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_clients_that_come_at_once_each_get_their_own_picture(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    def took_s(_: JointSteps, work: Callable[[], object], tries: int = 3) -> float:
        """Work takes the less, the later it is asked for: joint steps are tried last."""
        work()
        durations.append(0.5 * durations[-1])
        return durations[-1]

    durations, go_on = [0.1], threading.Event()
    encode_text = FluxPipeline.encode_text

    def waiting(pipe: FluxPipeline, job: Any) -> Any:
        assert go_on.wait(60)
        return encode_text(pipe, job)

    monkeypatch.setattr(JointSteps, "_took_s", took_s)
    monkeypatch.setattr(FluxPipeline, "encode_text", waiting)
    settings = {"device": "cpu", "batching": batching}
    made = settings_for_tests(**settings)
    live = start_live(load=pipeline_loader(None, made), settings=settings)
    asked = {"width": 64, "height": 64, "steps": 3}

    def picture(answer: httpx2.Response) -> Any:
        assert answer.status_code == 200
        data = base64.b64decode(answer.json()["images"][0]["b64"])
        return np.asarray(Image.open(io.BytesIO(data))).astype(int)

    later = [live.generate_later("a red circle", seed=seed, **asked) for seed in range(6)]
    wait_until(lambda: live.depth == 5)
    go_on.set()
    together = [picture(answer) for answer in answers(later)]
    joint = figure(live, "fluxd_joint_steps_total")
    alone = [picture(live.generate("a red circle", seed=seed, **asked)) for seed in range(6)]
    assert figure(live, "fluxd_joint_steps_total") == joint
    assert joint > 0 or batching == "exact"
    for seed, found in enumerate(together):
        apart = [abs(found - other).max() for other in alone]
        assert apart[seed] == 0 if batching == "exact" else apart[seed] <= 2
        assert all(apart[seed] < other for i, other in enumerate(apart) if i != seed)
