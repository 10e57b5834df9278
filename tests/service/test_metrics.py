"""/metrics: every figure after known events, bounded labels, and the watch over the event loop."""

from __future__ import annotations

import time

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app.engine import JobOptions, Packing
from app.keys import digest_of, new_key
from app.main import create_app, create_engine
from app.metrics import MOST_NOTED, Metrics
from fluxcore import FluxPipeline
from fluxcore.params import GenerationParams
from fluxcore.version import __version__
from tests.service.conftest import (
    PATIENCE_S,
    Live,
    Start,
    StartLive,
    settings_for_tests,
    wait_until,
)
from tests.service.fake_pipeline import FakePipeline, loader_of
from tests.service.test_scheduling import send_only

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(live: Live) -> Samples:
    with live.client() as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return parsed(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def test_jobs_steps_pictures_and_times_are_counted(start_live: StartLive) -> None:
    live = start_live(FakePipeline(slice_s_at_512=0.01))
    live.generate("a", steps=3, n=2, width=512, height=512)
    live.generate("b", steps=5, width=512, height=512)
    live.generate("fail")
    live.generate("oom")
    found = scraped(live)
    assert value(found, "fluxd_jobs_total", outcome="completed") == 2
    assert value(found, "fluxd_jobs_total", outcome="internal_error") == 1
    assert value(found, "fluxd_jobs_total", outcome="out_of_memory") == 1
    assert value(found, "fluxd_images_total") == 3
    # Two jobs fail after the first of their slices, the text.
    assert value(found, "fluxd_steps_total") == 3 * 2 + 5
    assert value(found, "fluxd_step_seconds_count") == 3 * 2 + 5
    assert value(found, "fluxd_queue_wait_seconds_count") == 4
    assert value(found, "fluxd_job_seconds_count") == 2
    assert value(found, "fluxd_stage_seconds_sum", stage="denoise") == pytest.approx(0.004)
    for stage in ("text", "decode", "paused", "pack"):
        assert value(found, "fluxd_stage_seconds_count", stage=stage) == 2
    assert value(found, "fluxd_device_busy_seconds_total") >= 9 * 0.01
    assert value(found, "fluxd_distinct_shapes") == 1
    live.generate("c", width=64, height=64)
    assert value(scraped(live), "fluxd_distinct_shapes") == 2


def test_what_is_noted_is_counted_at_the_latest_when_somebody_looks() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.sliced("denoise", 0.5)
    metrics.answered("GET", "/health", 200, 0.001)
    total = metrics.registry.get_sample_value
    assert total("fluxd_steps_total") == 3
    assert total("fluxd_device_busy_seconds_total") == pytest.approx(1.5)
    assert total("fluxd_steps_total") == 3
    answers = {"method": "GET", "route": "/health", "status": "200"}
    assert total("fluxd_http_requests_total", answers) == 1


def test_what_nobody_looks_at_does_not_pile_up() -> None:
    metrics = Metrics()
    # The first of a registry, so that nothing is shown before all is counted.
    counted = next(iter(metrics.registry._collector_to_names))
    metrics.registry.unregister(counted)
    for _ in range(MOST_NOTED + 1):
        metrics.sliced("denoise", 0.5)
    metrics.sliced("denoise", 0.5)
    assert metrics.registry.get_sample_value("fluxd_steps_total") == MOST_NOTED + 1


def test_what_waits_and_runs_is_shown_while_it_does(start_live: StartLive) -> None:
    live = start_live(settings={"queue_limit": 1})
    live.generate("measured")
    live.pipeline.close_gate()
    first = live.generate_later("first")
    live.pipeline.started.wait()
    second = live.generate_later("second")
    wait_until(lambda: live.depth == 1)
    assert live.generate("third").status_code == 429
    found = scraped(live)
    assert value(found, "fluxd_queue_depth") == 1
    assert value(found, "fluxd_jobs_running") == value(found, "fluxd_jobs_in_flight") == 1
    assert value(found, "fluxd_queue_work_seconds") > 0
    assert value(found, "fluxd_rejections_total", reason="jobs") == 1
    live.pipeline.gate.set()
    assert first.answer().status_code == second.answer().status_code == 200
    found = scraped(live)
    assert value(found, "fluxd_queue_depth") == value(found, "fluxd_jobs_in_flight") == 0


def test_a_client_that_leaves_is_counted(start_live: StartLive) -> None:
    live = start_live()
    live.pipeline.close_gate()
    connection = send_only(live, "left")
    live.pipeline.started.wait()
    connection.close()
    wait_until(lambda: live.engine._scheduler.active[0].cancelled is not None)
    live.pipeline.gate.set()
    wait_until(lambda: live.engine.is_idle)
    found = scraped(live)
    assert value(found, "fluxd_client_disconnects_total") == 1
    assert value(found, "fluxd_jobs_total", outcome="client_left") == 1
    assert value(found, "fluxd_images_total") == 0


def test_what_the_guard_refuses_is_counted(start_live: StartLive) -> None:
    live = start_live(settings={"rate_limit_per_minute": 2, "max_body_bytes": 100_000})
    with live.client() as client:
        client.get("/health", headers={"host": "evil.example"})
        client.get("/health", headers={"origin": "http://evil.example"})
        for content in (b"x" * 100_001, iter([b"x" * 60_000, b"x" * 60_000])):
            client.post(
                "/v1/generate", content=content, headers={"content-type": "application/json"}
            )
        client.post("/v1/generate", json={})
    found = scraped(live)
    for reason in ("host_not_allowed", "origin_not_allowed"):
        assert value(found, "fluxd_rejections_total", reason=reason) == 1
    # Announced in the one, found out while reading in the other.
    assert value(found, "fluxd_rejections_total", reason="body_too_large") == 2
    assert value(found, "fluxd_rejections_total", reason="rate_limit_exceeded") == 1


def test_refusals_while_ending_are_counted(start_live: StartLive) -> None:
    live = start_live()
    live.engine.drain()
    live.generate("late")
    found = scraped(live)
    assert value(found, "fluxd_rejections_total", reason="shutting_down") == 1
    assert value(found, "fluxd_ready") == 0


def test_previews_are_counted(start_live: StartLive) -> None:
    live = start_live()
    job = live.engine.submit(GenerationParams(prompt="x"), Packing(), "req", JobOptions(previews=2))
    timings = job.future.result(PATIENCE_S).timings_ms
    found = scraped(live)
    assert value(found, "fluxd_previews_total") == 2
    assert timings["previews"] > 0
    assert value(found, "fluxd_stage_seconds_count", stage="previews") == 1


def test_model_memory_and_cache_are_shown(start_live: StartLive) -> None:
    live = start_live()
    cache = live.pipeline.conditioning_cache
    cache.hits, cache.misses, cache.bytes_used = 3, 4, 5000
    found = scraped(live)
    info = {"version": __version__, "model": "fake-model", "device": "fake"}
    assert value(found, "fluxd_model_info", **info) == 1
    assert value(found, "fluxd_memory_bytes", place="device_allocated") == 2000
    assert value(found, "fluxd_memory_bytes", place="host_peak") == 1000
    assert value(found, "fluxd_conditioning_cache_hits_total") == 3
    assert value(found, "fluxd_conditioning_cache_misses_total") == 4
    assert value(found, "fluxd_conditioning_cache_bytes") == 5000
    assert value(found, "fluxd_alive") == value(found, "fluxd_ready") == 1


def test_answers_are_counted_by_route_and_clients_cannot_make_new_labels(
    start_live: StartLive,
) -> None:
    live = start_live()
    live.generate("a")
    live.generate("b", steps=0)
    with live.client() as client:
        for i in range(20):
            client.get(f"/no/such/{i}")
            client.request(f"VERB{i}", "/health")
    found = scraped(live)
    route = {"method": "POST", "route": "/v1/generate"}
    assert value(found, "fluxd_http_requests_total", **route, status="200") == 1
    assert value(found, "fluxd_http_requests_total", **route, status="400") == 1
    unknown = {"method": "GET", "route": "unknown", "status": "404"}
    assert value(found, "fluxd_http_requests_total", **unknown) == 20
    labels = {labels for name, labels in found if name == "fluxd_http_requests_total"}
    assert len(labels) <= 6


def test_the_event_loop_s_lag_shows_what_blocked_it() -> None:
    settings = settings_for_tests()
    app = create_app(settings, create_engine(settings, loader_of(FakePipeline())))

    @app.get("/blocking")
    async def blocking() -> None:
        time.sleep(0.3)

    with TestClient(app) as client:
        client.get("/blocking")
        # Timers go on meanwhile; the one that was blocked has come by then.
        wait_until(
            lambda: (
                value(parsed(client.get("/metrics").text), "fluxd_event_loop_lag_seconds_sum")
                > 0.15
            )
        )
        found = parsed(client.get("/metrics").text)
    count = value(found, "fluxd_event_loop_lag_seconds_count")
    assert value(found, "fluxd_event_loop_lag_seconds_bucket", le="0.1") < count


def test_the_form_is_as_the_scraper_asks(start: Start) -> None:
    answer = start().get(
        "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert list(openmetrics.text_string_to_metric_families(answer.text))


def test_metrics_need_a_key_where_there_are_keys(start: Start) -> None:
    key = new_key()
    client = start(api_keys=(f"scraper:{digest_of(key)}",))
    assert client.get("/metrics").status_code == 401
    answer = client.get("/metrics", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200
    assert value(parsed(answer.text), "fluxd_rejections_total", reason="invalid_api_key") == 1


def test_a_real_pipeline_s_memory_and_cache_are_shown(
    tiny_pipeline: FluxPipeline, start: Start
) -> None:
    client = start(tiny_pipeline)
    hits = tiny_pipeline.conditioning_cache.hits
    for _ in range(2):
        client.post("/v1/generate", json={"prompt": "counted", "width": 64, "height": 64})
    found = parsed(client.get("/metrics").text)
    assert value(found, "fluxd_conditioning_cache_hits_total") >= hits + 1
    assert value(found, "fluxd_memory_bytes", place="host_peak") > tiny_pipeline.info.weight_bytes
