"""The worker draws on while packing stands still."""

from __future__ import annotations

import threading

import pytest

from app.engine import packing
from tests.service.conftest import PATIENCE_S, StartLive, wait_until


def test_the_worker_draws_on_while_pictures_cannot_be_packed(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, go_on = packing.pack_picture, threading.Event()

    def stuck(*given: object) -> object:
        assert go_on.wait(PATIENCE_S)
        return plain(*given)  # type: ignore[arg-type]

    live = start_live()
    monkeypatch.setattr(packing, "pack_picture", stuck)
    answers = [live.generate_later(f"job {i}") for i in range(4)]
    wait_until(lambda: len(live.pipeline.ended) == 4)
    assert [later._answer for later in answers] == [None] * 4
    go_on.set()
    assert [later.answer().status_code for later in answers] == [200] * 4
