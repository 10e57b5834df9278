"""Many clients at once over real connections: all who stay are answered, as they were told."""

from __future__ import annotations

import asyncio

import pytest

from loadtest.clients import run
from tests.service.conftest import StartLive, wait_until
from tests.service.fake_pipeline import FakePipeline


def test_all_who_stay_get_their_own_picture(
    start_live: StartLive, caplog: pytest.LogCaptureFixture
) -> None:
    live = start_live(FakePipeline(slice_s_at_512=0.05), settings={"queue_limit": 8})
    outcome = asyncio.run(run(live.url, clients=60, leaving=0.3, limit_s=60.0))
    assert outcome.wrong == []
    assert outcome.answered + outcome.left == 60
    assert outcome.answered >= 30 and outcome.left >= 5
    assert outcome.refusals > 5
    # One slow moment of a busy machine may break a promise, no more.
    assert len(outcome.dishonest) <= 0.1 * len(outcome.waits_s), outcome.dishonest
    wait_until(lambda: live.engine.is_idle)
    assert not live.engine._worker._flights
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
