"""A service whose pipeline is fake and whose jobs are kept, started as often as wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.engine import Engine, Packing
from app.jobs.files import new_job_id
from app.jobs.opening import Kept, open_kept
from app.jobs.records import JobRecord, JobStatus, NewJob, StoredRequest
from app.jobs.runner import JobRunner
from app.main import create_engine
from fluxcore.params import GenerationParams
from tests.service.conftest import settings_for_tests, wait_until
from tests.service.fake_pipeline import FakePipeline, FakeResult, FakeSlice, loader_of


@dataclass
class SeeingPipeline(FakePipeline):
    """Remembers what it was asked to draw."""

    seen: list[GenerationParams] = field(default_factory=list)

    def run(
        self, params: GenerationParams, *, alone: bool = False
    ) -> Generator[FakeSlice, None, FakeResult]:
        self.seen.append(params)
        return super().run(params)


@dataclass
class Service:
    """An engine around a fake pipeline, and the jobs that are kept for it."""

    engine: Engine
    kept: Kept
    pipeline: SeeingPipeline

    @property
    def runner(self) -> JobRunner:
        return self.kept.jobs

    def accept(self, prompt: str = "a fox", **given: Any) -> str:
        asked = {name: given.pop(name) for name in ("references", "mask") if name in given}
        options = {"seed": 3, "n": given.pop("n", 1), **asked}
        params = GenerationParams(prompt=prompt, **options)
        new = NewJob(
            id=new_job_id(),
            client="local",
            request_id="req_1",
            priority=given.pop("priority", "normal"),
            created_s=time.time(),
            deadline_s=given.pop("deadline_s", None),
            request=StoredRequest.of(params, Packing("png"), previews=given.pop("previews", 0)),
        )
        accepted = self.runner.accept(new, params)
        assert not accepted.is_repeat and not given
        return accepted.record.id

    def record(self, job_id: str) -> JobRecord:
        return self.runner.store.get(job_id).result()

    def wait(self, job_id: str, status: JobStatus = JobStatus.COMPLETED) -> JobRecord:
        wait_until(lambda: self.record(job_id).status is status)
        return self.record(job_id)

    def end(self) -> None:
        self.engine.stop()
        self.kept.close()


Open = Callable[..., Service]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def start_jobs(data: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def begin(
            directory: Path = data, pipeline: SeeingPipeline | None = None, **given: Any
        ) -> Service:
            fake = pipeline or SeeingPipeline()
            settings = settings_for_tests(data_dir=str(directory), **given)
            engine = create_engine(settings, loader_of(fake))
            kept = open_kept(settings, engine)
            assert kept is not None
            service = Service(engine, kept, fake)
            engine.start()
            kept.start()
            stack.callback(service.end)
            stack.callback(fake.gate.set)
            wait_until(lambda: engine.status().is_ready)
            return service

        yield begin


def files_of(data: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (data / kind).iterdir())
