"""Waiting for a job: whether its client is still there is looked at a little later."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest
from starlette.requests import Request

from app.api import waiting
from app.errors import ClientLeftError, ServiceError


class FakeJob:
    """What of a job is waited for."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()

    @property
    def is_settled(self) -> bool:
        return self.future.done()


class FakeEngine:
    def __init__(self) -> None:
        self.cancelled: list[ServiceError] = []

    def cancel(self, _: FakeJob, reason: ServiceError) -> None:
        self.cancelled.append(reason)


class LeftClient:
    """A connection that was closed from the other side; counts who asks."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self) -> dict[str, str]:
        self.asked += 1
        return {"type": "http.disconnect"}


async def outcome(client: LeftClient, engine: FakeEngine, job: FakeJob) -> Any:
    request = Request({"type": "http"}, client)  # type: ignore[arg-type]
    return await waiting.outcome_of(request, engine, job, timeout_s=30)  # type: ignore[arg-type]


def test_a_client_that_has_left_at_once_ends_its_job() -> None:
    client, engine = LeftClient(), FakeEngine()
    with pytest.raises(ClientLeftError):
        asyncio.run(outcome(client, engine, FakeJob()))
    assert [type(reason) for reason in engine.cancelled] == [ClientLeftError]


def test_of_a_job_that_is_done_sooner_nobody_looks_for_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, engine, job = LeftClient(), FakeEngine(), FakeJob()
    monkeypatch.setattr(waiting, "WATCHED_AFTER_S", 10)

    async def waited_for() -> tuple[Any, set[asyncio.Task[Any]]]:
        task = asyncio.create_task(outcome(client, engine, job))
        await asyncio.sleep(0)
        job.future.set_result("the picture")
        return await task, asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]

    assert asyncio.run(waited_for()) == ("the picture", set())
    assert (client.asked, engine.cancelled) == (0, [])
