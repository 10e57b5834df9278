"""Many clients at once over real connections: all who stay are answered, as they were told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator

import pytest

from app.engine.costs import CostModel, WorkLeft
from fluxcore.params import GenerationParams
from loadtest.clients import run
from tests.service.conftest import Live, StartLive, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice


class TimedPipeline(FakePipeline):
    """Its slices take what the cost model supposes of their sizes, at a speed of their own.

    Many milliseconds each: what a busy machine does in between is small beside them.
    """

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed
        # How many are waiting, and how long it stood still because nobody was.
        self.depth: Callable[[], int] = int
        self.idle_s = 0.0
        self._worked_s: float | None = None

    def forget_idle_time(self) -> None:
        """Count anew, from the next job on."""
        self.idle_s, self._worked_s = 0.0, None

    def run(self, params: GenerationParams) -> Generator[FakeSlice, None, FakeResult]:
        if self._worked_s is not None and self.depth() == 0:
            self.idle_s += time.monotonic() - self._worked_s
        slices = super().run(params)
        costs, left = CostModel(), WorkLeft(params, self.prepare(params).params, 0)
        while True:
            try:
                done = next(slices)
            except StopIteration as end:
                result: FakeResult = end.value
                return result
            time.sleep(self._speed * costs.estimate_s(left.unit(done.stage)))
            self._worked_s = time.monotonic()
            yield done


def start_measured(start_live: StartLive, pipeline: TimedPipeline, **settings: object) -> Live:
    """A service that has drawn a few pictures, so that it has measured its speed."""
    live = start_live(pipeline, settings=settings)
    for _ in range(3):
        assert live.generate("before", width=256, height=256).status_code == 200
    wait_until(lambda: live.engine.is_idle)
    pipeline.depth = lambda: live.depth
    return live


def test_all_who_stay_get_their_own_picture(
    start_live: StartLive, caplog: pytest.LogCaptureFixture
) -> None:
    live = start_measured(start_live, TimedPipeline(speed=0.1), queue_limit=4, in_flight_limit=4)
    outcome = asyncio.run(run(live.url, clients=40, leaving=0.3, limit_s=60.0))
    assert outcome.wrong == []
    assert outcome.answered + outcome.left == 40
    assert outcome.answered >= 20 and outcome.left >= 5
    assert outcome.refusals > 5
    wait_until(lambda: live.engine.is_idle)
    assert not live.engine._worker._flights
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_clients_are_let_in_when_they_were_told_and_told_no_longer_than_needed(
    start_live: StartLive,
) -> None:
    """Nobody leaves: how long the others have to wait would hang on who does.

    Told a third of the true wait, four in ten are refused again for longer than that; told
    three times as much, they leave the device idle for half of the time or more. A busy
    machine may spoil one crowd, but not three.
    """
    pipeline = TimedPipeline(speed=0.18)
    live = start_measured(start_live, pipeline, queue_limit=4, in_flight_limit=2)
    seen = []
    for _ in range(3):
        pipeline.forget_idle_time()
        started_s = time.monotonic()
        outcome = asyncio.run(run(live.url, clients=30, leaving=0.0, limit_s=60.0))
        spent_s = time.monotonic() - started_s
        assert outcome.wrong == [] and outcome.answered == 30
        assert len(outcome.waits_s) > 15
        wait_until(lambda: live.engine.is_idle)
        late, idle = len(outcome.dishonest) / len(outcome.waits_s), pipeline.idle_s / spent_s
        seen.append((late, idle))
        if late <= 0.1 and idle <= 0.35:
            return
    pytest.fail(f"shares of broken promises and of idle time: {seen}")
