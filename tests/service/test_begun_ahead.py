"""The next job's first work, queued while the device is at the last of the one before."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.engine import Engine, JobOptions, Packing, flight, packing, policy
from app.engine.admission import Limits
from app.engine.events import Started
from app.engine.flight import Flight
from app.engine.jobs import Job, JobState, Priority
from app.engine.scheduler import Scheduler, Turn
from app.errors import ClientLeftError, JobTimeoutError, ShuttingDownError
from app.main import pipeline_loader
from app.metrics import Metrics
from fluxcore import FluxPipeline
from fluxcore.errors import DeviceFaultError, OutOfMemoryError
from fluxcore.params import GenerationParams
from fluxcore.pipeline.run import Run
from fluxcore.runtime import Runtime
from tests.service.conftest import PATIENCE_S, Live, StartLive, settings_for_tests, wait_until
from tests.service.fake_pipeline import FakeDevice, FakePipeline, FakeSlice
from tests.service.simulated_device import device, make
from tests.service.test_joint_jobs import Ledger

INTERACTIVE = JobOptions(priority=Priority.INTERACTIVE)


class AheadRun:
    """A fake pipeline's run whose end can be held, and be made to fail."""

    def __init__(self, pipeline: AheadPipeline, params: GenerationParams, slices: Any) -> None:
        self._pipeline, self._prompt, self._slices = pipeline, params.prompt, slices
        self._last = (params.n - 1, params.steps or 4)
        self._is_ending = False
        self._meanwhile: Callable[[], None] = lambda: None

    def meanwhile(self, work: Callable[[], None]) -> None:
        assert self._pipeline.begins_ahead, "asked where no job begins ahead"
        self._meanwhile = work

    def begin(self) -> None:
        self._pipeline.told.append(f"begin {self._prompt}")
        trouble = self._pipeline.trouble.get(f"begin {self._prompt}")
        if trouble is not None:
            raise trouble

    def __next__(self) -> FakeSlice:
        if self._is_ending:
            self._pipeline.told.append(f"wait for {self._prompt}")
            self._pipeline.at_end.set()
            assert self._pipeline.holding.wait(PATIENCE_S)
            trouble = self._pipeline.trouble.pop(f"wait for {self._prompt}", None)
            if trouble is not None:
                raise trouble
        done: FakeSlice = next(self._slices)
        is_last = (done.image_index, done.step) == self._last
        self._is_ending = is_last and done.stage == "denoise"
        if self._is_ending:
            self._meanwhile()
        return replace(done, has_more=is_last and done.stage == "decode")

    def close(self) -> None:
        if self._prompt not in self._pipeline.ended:
            self._pipeline.told.append(f"close {self._prompt}")
        self._slices.close()


@dataclass
class NotingDevice(FakeDevice):
    told: list[str] = field(default_factory=list)

    def release_memory(self) -> None:
        self.told.append("release memory")


@dataclass
class AheadPipeline(FakePipeline):
    """``told`` is what was begun, waited for and given up, in order.

    Attributes:
        trouble: raised by what ``told`` would say.
        holding: no last picture comes while it is closed; ``at_end`` says that one is waited for.
    """

    begins_ahead: bool = True
    told: list[str] = field(default_factory=list)
    trouble: dict[str, Exception] = field(default_factory=dict)
    holding: threading.Event = field(default_factory=threading.Event)
    at_end: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.holding.set()
        self.runtime = NotingDevice(told=self.told)

    def run(self, params: GenerationParams, *, alone: bool = False) -> Any:
        return AheadRun(self, params, super().run(params))


@dataclass
class Held:
    """A service whose job ``one`` stands at its end, with ``two`` begun behind it."""

    live: Live
    pipeline: AheadPipeline
    one: Job
    two: Job

    @property
    def engine(self) -> Engine:
        return self.live.engine

    @property
    def told(self) -> list[str]:
        return self.pipeline.told

    def submit(self, prompt: str, options: JobOptions | None = None) -> Job:
        return submit(self.engine, prompt, options)

    def go_on(self) -> None:
        self.pipeline.holding.set()

    def goes_on_to_its_end(self) -> None:
        """All that is left is answered, and the worker holds nothing."""
        self.go_on()
        wait_until(lambda: self.engine.is_idle)
        worker = self.engine._worker
        wait_until(lambda: not worker._flights and worker._ahead is None)
        assert not self.engine._scheduler._gone
        assert self.engine.status().is_alive


def submit(engine: Engine, prompt: str, options: JobOptions | None = None) -> Job:
    params = GenerationParams(prompt=prompt, steps=2, width=64, height=64)
    return engine.submit(params, Packing(), prompt, options or JobOptions())


def submit_held(
    live: Live, *prompts: str, two: JobOptions | None = None
) -> tuple[AheadPipeline, list[Job]]:
    pipeline = live.pipeline
    assert isinstance(pipeline, AheadPipeline)
    pipeline.holding.clear()
    pipeline.close_gate()
    jobs = [submit(live.engine, "one")]
    assert pipeline.started.wait(PATIENCE_S)
    jobs += [submit(live.engine, prompt, two) for prompt in prompts]
    pipeline.gate.set()
    assert pipeline.at_end.wait(PATIENCE_S)
    return pipeline, jobs


Hold = Callable[..., Held]


@pytest.fixture
def hold(start_live: StartLive, monkeypatch: pytest.MonkeyPatch) -> Hold:
    # The oldest job's own share would depend on how long slices of nothing take.
    monkeypatch.setattr(policy, "OLDEST_SHARE", 0.0)

    def begin(options: JobOptions | None = None, **settings: Any) -> Held:
        live = start_live(AheadPipeline(), settings=settings)
        pipeline, (one, two) = submit_held(live, "two", two=options)
        assert pipeline.told == ["begin two", "wait for one"]
        return Held(live, pipeline, one, two)

    return begin


def drawn(job: Job) -> bool:
    return bool(job.future.result(PATIENCE_S).pictures)


def test_the_next_job_is_begun_before_the_last_picture_is_waited_for(hold: Hold) -> None:
    held = hold()
    seen: list[object] = []
    held.two.watch(seen.append)
    assert held.two.state == JobState.QUEUED and held.two.started_s is None
    assert held.engine.status().queue_depth == 1
    assert not any(isinstance(event, Started) for event in seen)
    held.goes_on_to_its_end()
    assert drawn(held.one) and drawn(held.two)
    assert held.told == ["begin two", "wait for one", "wait for two"]
    assert held.pipeline.ran == ["one", "two"], "one run each"
    assert sum(isinstance(event, Started) for event in seen) == 1


def test_one_job_is_begun_at_a_time(start_live: StartLive) -> None:
    live = start_live(AheadPipeline())
    pipeline, jobs = submit_held(live, "two", "three", "four")
    pipeline.holding.set()
    assert all(drawn(job) for job in jobs)
    assert pipeline.told == [
        *("begin two", "wait for one", "begin three", "wait for two"),
        *("begin four", "wait for three", "wait for four"),
    ]


def test_no_job_is_begun_where_nothing_runs_ahead(start_live: StartLive) -> None:
    live = start_live(AheadPipeline(begins_ahead=False))
    pipeline, jobs = submit_held(live, "two", "three")
    pipeline.holding.set()
    assert all(drawn(job) for job in jobs)
    assert pipeline.told == ["wait for one", "wait for two", "wait for three"]


def test_one_that_is_cancelled_is_let_go_of_although_no_other_comes(hold: Hold) -> None:
    held = hold()
    held.engine.cancel(held.two, ClientLeftError("gone"))
    with pytest.raises(ClientLeftError):
        held.two.future.result(PATIENCE_S)
    held.goes_on_to_its_end()
    assert drawn(held.one)
    assert held.told == ["begin two", "wait for one", "close two"]


def test_one_that_is_cancelled_while_the_worker_sleeps_is_let_go_of(
    hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was passed by a job that took the last place in flight."""
    plain, go_on = packing.pack_picture, threading.Event()

    def stuck(*given: object) -> object:
        assert go_on.wait(PATIENCE_S)
        return plain(*given)  # type: ignore[arg-type]

    held = hold(in_flight_limit=2)
    monkeypatch.setattr(packing, "pack_picture", stuck)
    three = held.submit("three", INTERACTIVE)
    held.go_on()
    wait_until(lambda: held.told[-1] == "wait for three" and held.engine._scheduler._packing == 2)
    worker = held.engine._worker
    assert worker._ahead is held.two and held.two.state == JobState.QUEUED
    held.engine.cancel(held.two, ClientLeftError("gone"))
    wait_until(lambda: not worker._flights)
    assert held.told[-1] == "close two"
    go_on.set()
    held.goes_on_to_its_end()
    assert drawn(held.one) and drawn(three)


def test_one_whose_deadline_passes_is_let_go_of(hold: Hold) -> None:
    deadline_s = 1.5
    held = hold(JobOptions(deadline_s=deadline_s))
    wait_until(lambda: time.monotonic() > held.two.accepted_s + 1.1 * deadline_s)
    held.go_on()
    with pytest.raises(JobTimeoutError):
        held.two.future.result(PATIENCE_S)
    held.goes_on_to_its_end()
    assert drawn(held.one)
    assert held.told == ["begin two", "wait for one", "close two"]


def test_an_end_of_the_service_lets_go_of_it(hold: Hold) -> None:
    held = hold()
    held.engine.drain()
    with pytest.raises(ShuttingDownError):
        held.two.future.result(PATIENCE_S)
    held.go_on()
    assert drawn(held.one)
    assert held.engine.stop(grace_s=PATIENCE_S)
    assert held.told == ["begin two", "wait for one", "close two"]
    assert not held.engine._worker._flights and held.engine._worker._ahead is None


@pytest.mark.parametrize(
    "trouble",
    [RuntimeError("a bug"), OutOfMemoryError("too little"), DeviceFaultError("one colour")],
)
@pytest.mark.parametrize("lasts", [False, True])
def test_trouble_with_it_is_its_own(start_live: StartLive, trouble: Exception, lasts: bool) -> None:
    """And shows in its own turn, if it is still there."""
    pipeline = AheadPipeline(trouble={"begin two": trouble})
    live = start_live(pipeline)
    _, (one, two) = submit_held(live, "two")
    assert pipeline.told == ["begin two", "close two", "wait for one"]
    if lasts:
        pipeline.trouble["wait for two"] = trouble
    held = Held(live, pipeline, one, two)
    held.go_on()
    assert drawn(one)
    if lasts:
        assert two.future.exception(PATIENCE_S) is not None
    else:
        assert drawn(two)
    assert ("release memory" in pipeline.told) == (lasts and isinstance(trouble, OutOfMemoryError))
    assert drawn(held.submit("three"))
    held.goes_on_to_its_end()


def test_it_is_let_go_of_before_memory_is_given_back(hold: Hold) -> None:
    held = hold()
    held.pipeline.trouble["wait for one"] = OutOfMemoryError("too little")
    held.goes_on_to_its_end()
    assert held.one.future.exception() is not None and drawn(held.two)
    assert held.told[2:] == ["close one", "close two", "release memory", "wait for two"]


def test_a_fault_of_the_job_before_it_leaves_it_begun(hold: Hold) -> None:
    held = hold()
    held.pipeline.trouble["wait for one"] = DeviceFaultError("one constant colour")
    held.goes_on_to_its_end()
    assert held.one.future.exception() is not None and drawn(held.two)
    assert held.told[2:] == ["close one", "wait for two"]


def test_it_may_be_passed_and_stays_begun(hold: Hold) -> None:
    held = hold()
    three = held.submit("three", INTERACTIVE)
    held.goes_on_to_its_end()
    assert drawn(three) and drawn(held.two)
    assert held.told[1:] == ["wait for one", "wait for three", "wait for two"]


def test_another_that_is_to_be_begun_takes_its_place(hold: Hold) -> None:
    held = hold()
    jobs = [held.submit(prompt, INTERACTIVE) for prompt in ("three", "four")]
    held.goes_on_to_its_end()
    assert all(drawn(job) for job in (*jobs, held.two))
    assert held.told[1:] == [
        *("wait for one", "close two", "begin four", "wait for three"),
        *("begin two", "wait for four", "wait for two"),
    ]


def test_its_first_slice_is_charged_with_what_beginning_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(100))
    monkeypatch.setattr(flight, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    ledger = Ledger()
    ahead = Flight(make("two"), AheadPipeline(), ledger, Metrics())  # type: ignore[arg-type]
    ahead.begin()
    ahead.advance()
    ahead.advance()
    # A second passes from the beginning to the end of a slice, and of beginning.
    assert ledger.told == [("text", 2.0), ("denoise", 1.0)]
    assert ahead.times.own_s == 2.0, "which is since it was started"


# --- the scheduler -----------------------------------------------------------


def taken(scheduler: Scheduler) -> Turn:
    turn = scheduler.poll()
    assert turn is not None
    return turn


def test_what_would_be_next_is_what_comes_next() -> None:
    made = device()
    scheduler = made.scheduler
    one, long, short = make("one", 256), make("long", 1024), make("short", 512)
    for job in (one, long, short):
        scheduler.admit(job)
    assert taken(scheduler).job is one
    oldest = scheduler._policy._oldest
    assert scheduler.next_after(one) is short
    assert scheduler._policy._oldest is oldest and scheduler.depth == 2
    made.take(Turn(one))
    assert taken(scheduler).job is one, "it is not passed by being asked about"
    assert scheduler.remove(short)
    assert taken(scheduler) == Turn(short, is_gone=True)
    assert scheduler.next_after(one) is long


def test_nothing_is_next_while_another_is_in_flight_or_there_is_no_place() -> None:
    made = device(Limits(jobs=10, work_s=1e6, in_flight=2))
    scheduler = made.scheduler
    one, two, three = make("one", 1024), make("two", 256), make("three", 512)
    scheduler.admit(one)
    assert taken(scheduler).job is one
    assert scheduler.next_after(one) is None, "nobody waits"
    scheduler.admit(two)
    scheduler.admit(three)
    assert taken(scheduler).job is two
    assert scheduler.next_after(two) is None, "both places are taken"
    scheduler.finished(two)
    scheduler.packing(+1)
    assert scheduler.next_after(one) is None, "one is drawn and not yet packed"
    scheduler.packing(-1)
    assert scheduler.next_after(one) is three


def test_a_job_that_leaves_before_anybody_was_told_of_it_makes_no_turn() -> None:
    scheduler = device().scheduler
    one, two = make("one"), make("two")
    scheduler.admit(one)
    scheduler.admit(two)
    assert scheduler.remove(two)
    assert taken(scheduler).job is one
    assert not scheduler._gone


# --- the bundled model -------------------------------------------------------


def test_pictures_of_jobs_begun_ahead_are_the_same(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin, encode_text, go_on = Run.begin, FluxPipeline.encode_text, threading.Event()

    def waiting(pipe: FluxPipeline, job: Any) -> Any:
        assert go_on.wait(PATIENCE_S)
        return encode_text(pipe, job)

    def noted(run: Run) -> None:
        begun.append(1)
        begin(run)

    monkeypatch.setattr(Runtime, "runs_ahead", True)
    monkeypatch.setattr(Run, "begin", noted)
    monkeypatch.setattr(FluxPipeline, "encode_text", waiting)
    settings = {"device": "cpu", "batching": "off"}
    made = settings_for_tests(**settings)
    live = start_live(load=pipeline_loader(None, made), settings=settings)

    def ask(number: int) -> Any:
        size = {"width": 64, "height": 64, "steps": 1, "seed": number}
        return live.generate_later(f"{number} red circles", **size)

    def picture(later: Any) -> Any:
        data = base64.b64decode(later.answer().json()["images"][0]["b64"])
        return np.asarray(Image.open(io.BytesIO(data)))

    later = [ask(number) for number in range(4)]
    wait_until(lambda: live.depth == 3)
    go_on.set()
    together = [picture(one) for one in later]
    assert len(begun) == 3
    begun.clear()
    for number, found in enumerate(together):
        assert np.array_equal(found, picture(ask(number)))
    assert not begun
