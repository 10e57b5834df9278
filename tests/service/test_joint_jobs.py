"""Jobs whose steps are taken as one: the engine around a fake pipeline, and the real one."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.engine import Packing, flight, worker
from app.engine.events import StepDone
from app.engine.flight import Flight
from app.engine.jobs import Job
from app.errors import ClientLeftError
from app.main import pipeline_loader
from app.metrics import Metrics
from app.telemetry import configure_logging
from fluxcore import FluxPipeline
from fluxcore.errors import DeviceFaultError, OutOfMemoryError
from fluxcore.params import GenerationParams
from fluxcore.pipeline.joint_steps import JointSteps
from tests.service.conftest import Live, StartLive, settings_for_tests, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, as_drawn
from tests.service.simulated_device import make

# Clients of the bundled model that come at once.
JOBS = 4


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

    def run(self, params: GenerationParams, *, alone: bool = False) -> Any:
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

    def run(self, params: GenerationParams, *, alone: bool = False) -> Any:
        plain = [done for done in super().run(params) if done.stage == "denoise"]
        by_step = sorted(plain, key=lambda done: (done.step, done.image_index))
        for done in by_step:
            yield replace(done, has_more=done.image_index == 0)
        picture = as_drawn(Image.new("RGB", (params.width or 64, params.height or 64)))
        return FakeResult([picture] * 2, [0, 1], {}, [], self.prepare(params).params)


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
    in_hand = live.engine._worker._in_hand
    assert in_hand is not None and in_hand.slices == 2
    monkeypatch.setattr(worker, "LEAST_STALL_S", 0.0)
    one_s = live.engine._scheduler.expected_s(in_hand.job)
    assert one_s is not None
    monkeypatch.setattr(worker, "STALL_FACTOR", 1000 / one_s)
    for taken_s, is_stalled in ((1500, False), (2500, True)):
        live.engine._worker._in_hand = in_hand._replace(began_s=time.monotonic() - taken_s)
        assert live.engine._worker.is_stalled == is_stalled
    pipeline.holding.set()
    answers(later)


@dataclass
class Ledger:
    """Stands in for the scheduler: what each slice was said to have taken."""

    told: list[tuple[str, float]] = field(default_factory=list)
    is_alone = True

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


class LastAtOnce(FakePipeline):
    """Says of its last slice that only the result comes after it."""

    def run(self, params: GenerationParams, *, alone: bool = False) -> Any:
        yield FakeSlice("decode", 0, 1, 1, has_more=True)
        return "the result"


def test_a_job_ends_with_its_last_slice_which_is_charged_to_it() -> None:
    ledger = Ledger()
    job = Flight(make("one"), LastAtOnce(), ledger, Metrics())  # type: ignore[arg-type]
    job.advance()
    assert job.result == "the result"
    assert [stage for stage, _ in ledger.told] == ["decode"]


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
    asked = {"width": 64, "height": 64, "steps": 2}

    def picture(answer: httpx2.Response) -> Any:
        assert answer.status_code == 200
        data = base64.b64decode(answer.json()["images"][0]["b64"])
        return np.asarray(Image.open(io.BytesIO(data))).astype(int)

    later = [live.generate_later("a red circle", seed=seed, **asked) for seed in range(JOBS)]
    wait_until(lambda: live.depth == JOBS - 1)
    go_on.set()
    together = [picture(answer) for answer in answers(later)]
    joint = figure(live, "fluxd_joint_steps_total")
    alone = [picture(live.generate("a red circle", seed=seed, **asked)) for seed in range(JOBS)]
    assert figure(live, "fluxd_joint_steps_total") == joint
    assert joint > 0 or batching == "exact"
    for seed, found in enumerate(together):
        apart = [abs(found - other).max() for other in alone]
        assert apart[seed] == 0 if batching == "exact" else apart[seed] <= 2
        assert all(apart[seed] < other for i, other in enumerate(apart) if i != seed)


def test_a_job_is_told_whether_it_is_alone() -> None:
    """One that is may begin its first step before another could be joined to it."""
    told: list[bool] = []

    class Told(FakePipeline):
        def run(self, params: GenerationParams, *, alone: bool = False) -> Any:
            told.append(alone)
            return super().run(params)

    for is_alone in (True, False):
        ledger = Ledger()
        ledger.is_alone = is_alone
        Flight(make("one"), Told(), ledger, Metrics())  # type: ignore[arg-type]
    assert told == [True, False]
