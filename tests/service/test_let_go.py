"""What is over is let go of at once, and not when a collector of garbage comes.

Jobs hold pictures, and are many; and while a collector looks, everybody waits.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from app.api.security import guard
from app.api.security.bodies import BoundedBody
from app.engine.jobs import Job
from tests.service.conftest import StartLive, wait_until

ASKED = {"prompt": "a red fox"}


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """All jobs and bodies that are made from now on."""
    made: list[weakref.ref[Any]] = []

    class NotedBody(BoundedBody):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    plain = Job.__init__

    def noted(job: Job, *arguments: Any, **named: Any) -> None:
        plain(job, *arguments, **named)
        made.append(weakref.ref(job))

    monkeypatch.setattr(guard, "BoundedBody", NotedBody)
    monkeypatch.setattr(Job, "__init__", noted)
    return made


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("path", "asked", "accept"),
    [
        ("/v1/generate", ASKED, "image/png"),
        ("/v1/generate", ASKED, "application/json"),
        ("/v1/generate", {**ASKED, "stream": True, "previews": 1}, "text/event-stream"),
        ("/v1/images/generations", ASKED, "application/json"),
    ],
)
def test_an_answered_job_and_its_request_are_let_go_of(
    start_live: StartLive,
    left: list[weakref.ref[Any]],
    path: str,
    asked: dict[str, object],
    accept: str,
) -> None:
    live = start_live()
    with live.client() as client:
        for _ in range(2):
            answer = client.post(path, json=asked, headers={"Accept": accept})
            assert answer.status_code == 200
    wait_until(lambda: not any(one() is not None for one in left))
    assert len(left) == 2 * 2


def test_a_closed_connection_is_let_go_of(start_live: StartLive) -> None:
    live = start_live()
    connections = live.server.server_state.connections
    with live.client() as client:
        assert client.get("/health").status_code == 200
        (connection,) = map(weakref.ref, connections)
    wait_until(lambda: connection() is None)
