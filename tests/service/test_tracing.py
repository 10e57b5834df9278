"""Traces of jobs: spans for the job and its slices, under the request's own, and none without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app import tracing
from app.engine import JobOptions, Packing
from app.errors import ClientLeftError
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S, StartLive, wait_until
from tests.service.processes import ROOT


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Spans of this test alone; the process's own provider can be set only once."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("fluxd"))
    yield exporter
    provider.shutdown()


def test_a_job_is_a_span_with_one_for_each_slice(
    start_live: StartLive, exporter: InMemorySpanExporter
) -> None:
    engine = start_live().engine
    provider = TracerProvider()
    with provider.get_tracer("test").start_as_current_span("request") as request:
        job = engine.submit(
            GenerationParams(prompt="a private fox", width=128, height=64, steps=3),
            Packing(),
            "req_7",
            JobOptions(previews=1),
        )
    job.future.result(PATIENCE_S)
    *slices, whole = exporter.get_finished_spans()
    assert [span.name for span in slices] == [
        "fluxd.text",
        "fluxd.denoise",
        "fluxd.preview",
        "fluxd.denoise",
        "fluxd.denoise",
        "fluxd.decode",
    ]
    assert whole.name == "fluxd.job"
    assert whole.parent is not None
    assert whole.parent.span_id == request.get_span_context().span_id
    attributes = dict(whole.attributes or {})
    assert attributes["fluxd.request_id"] == "req_7"
    assert (attributes["fluxd.width"], attributes["fluxd.steps"]) == (128, 3)
    assert attributes["fluxd.outcome"] == "completed"
    assert attributes["fluxd.total_ms"] > 0  # type: ignore[operator]
    assert "private" not in whole.to_json()
    for span in slices:
        assert span.parent is not None
        assert span.parent.span_id == whole.get_span_context().span_id
        assert whole.start_time <= span.end_time <= whole.end_time
        assert span.start_time <= span.end_time


def test_a_job_that_fails_or_is_left_is_an_error(
    start_live: StartLive, exporter: InMemorySpanExporter
) -> None:
    live = start_live()
    live.generate("oom")
    live.pipeline.close_gate()
    job = live.engine.submit(GenerationParams(prompt="x"), Packing(), "req")
    live.pipeline.started.wait()
    live.engine.cancel(job, ClientLeftError("gone"))
    live.pipeline.gate.set()
    wait_until(lambda: job.is_settled)
    jobs = [span for span in exporter.get_finished_spans() if span.name == "fluxd.job"]
    assert [span.status.description for span in jobs] == ["out_of_memory", "client_left"]
    assert {span.status.status_code for span in jobs} == {trace.StatusCode.ERROR}


def test_without_the_package_there_are_no_traces_and_no_errors() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from app.tracing import JobTrace\n"
        "job = JobTrace({'a': 1}); job.sliced('text', 0.1); job.ended('completed', {})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE_S)


def test_without_a_provider_nothing_is_kept() -> None:
    job = tracing.JobTrace({"a": 1})
    assert job._span is None
