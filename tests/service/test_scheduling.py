"""Admission, order, cancelling and failures, over real connections to a fake pipeline."""

from __future__ import annotations

import json
import logging
import socket
import time

import httpx2
import pytest

from app.engine import JobOptions, Packing
from app.engine.admission import LONGEST_WAIT_S
from app.errors import ClientLeftError, JobTimeoutError
from fluxcore.params import GenerationParams
from tests.service.conftest import PATIENCE_S, Live, StartLive, error_of, wait_until
from tests.service.fake_pipeline import FakePipeline

# Long enough for a job of many slices to outlast what a test does beside it, however busy the
# machine is. Then the test sets it to 0, so that nobody waits for the rest.
LONG_SLICE_S = 0.1


def blocked(start_live: StartLive, **settings: object) -> tuple[Live, FakePipeline]:
    """A service whose first job, ``first``, runs and stands still."""
    live = start_live(settings=settings)
    live.pipeline.close_gate()
    return live, live.pipeline


def test_jobs_run_in_order_on_one_thread(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live)
    answers = [live.generate_later("first")]
    pipeline.started.wait()
    for depth, prompt in enumerate(["second", "third", "fourth"], start=1):
        answers.append(live.generate_later(prompt))
        wait_until(lambda depth=depth: live.depth == depth)
    pipeline.gate.set()
    assert [later.answer().status_code for later in answers] == [200] * 4
    assert pipeline.ended == ["first", "second", "third", "fourth"]
    assert len(pipeline.threads) == 1


def test_a_short_job_passes_a_long_one_after_one_step(start_live: StartLive) -> None:
    pipeline = FakePipeline(slice_s_at_512=LONG_SLICE_S)
    engine = start_live(pipeline).engine
    long = engine.submit(
        GenerationParams(prompt="long", width=512, height=512, steps=50), Packing(), "req-long"
    )
    wait_until(lambda: len(pipeline.slices) > 2)
    short = engine.submit(
        GenerationParams(prompt="short", width=256, height=256, steps=4), Packing(), "req-short"
    )
    accepted = len(pipeline.slices)
    outcome = short.future.result(PATIENCE_S)
    assert not long.is_settled
    pipeline.slice_s_at_512 = 0.0
    since = [prompt for prompt, *_ in pipeline.slices[accepted:]]
    before_the_end = since[: len(since) - since[::-1].index("short")]
    assert before_the_end.count("short") == 6
    assert before_the_end.count("long") <= 1
    assert outcome.timings_ms["paused"] < outcome.timings_ms["total"]
    # The long one goes on where it stood, and says how long it stood.
    long_timings = long.future.result(PATIENCE_S).timings_ms
    slices = [(stage, step) for prompt, stage, _, step in pipeline.slices if prompt == "long"]
    assert slices == [("text", 0), *(("denoise", i + 1) for i in range(50)), ("decode", 50)]
    assert long_timings["paused"] >= 6 * 1000 * LONG_SLICE_S / 4


def test_a_job_in_flight_that_is_cancelled_ends_while_another_runs(start_live: StartLive) -> None:
    pipeline = FakePipeline(slice_s_at_512=LONG_SLICE_S)
    engine = start_live(pipeline).engine
    long = engine.submit(
        GenerationParams(prompt="long", width=512, height=512, steps=100), Packing(), "req-long"
    )
    wait_until(lambda: len(pipeline.slices) > 2)
    middle = engine.submit(
        GenerationParams(prompt="middle", width=512, height=512, steps=50), Packing(), "req-middle"
    )
    wait_until(lambda: "middle" in pipeline.ran)
    engine.cancel(long, ClientLeftError("gone"))
    with pytest.raises(ClientLeftError):
        long.future.result(PATIENCE_S)
    assert pipeline.abandoned == ["long"]
    assert not middle.is_settled
    pipeline.slice_s_at_512 = 0.0
    assert middle.future.result(PATIENCE_S).pictures


def test_a_job_that_fails_as_it_is_given_up_does_not_end_the_service(
    start_live: StartLive, caplog: pytest.LogCaptureFixture
) -> None:
    live, pipeline = blocked(start_live)
    engine = live.engine
    job = engine.submit(
        GenerationParams(prompt="unclosable", steps=50), Packing(), "req-unclosable"
    )
    pipeline.started.wait()
    engine.cancel(job, ClientLeftError("gone"))
    pipeline.gate.set()
    with pytest.raises(ClientLeftError):
        job.future.result(PATIENCE_S)
    after = engine.submit(GenerationParams(prompt="after", steps=1), Packing(), "req-after")
    assert after.future.result(PATIENCE_S).pictures
    wait_until(lambda: "failed as it was closed" in caplog.text)
    assert engine.status().is_alive


def test_a_deadline_ends_a_job_wherever_it_stands(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live)
    engine = live.engine
    running = engine.submit(
        GenerationParams(prompt="running"), Packing(), "req-1", JobOptions(deadline_s=0.05)
    )
    pipeline.started.wait()
    waiting = engine.submit(
        GenerationParams(prompt="waiting"), Packing(), "req-2", JobOptions(deadline_s=0.05)
    )
    time.sleep(0.1)
    pipeline.gate.set()
    for job in (running, waiting):
        with pytest.raises(JobTimeoutError, match="deadline"):
            job.future.result(PATIENCE_S)
    assert pipeline.ran == pipeline.abandoned == ["running"]


def test_a_full_queue_refuses_and_says_when_to_come_back(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live, queue_limit=1)
    first = live.generate_later("first")
    pipeline.started.wait()
    second = live.generate_later("second")
    wait_until(lambda: live.depth == 1)

    refused = live.generate("third")
    assert refused.status_code == 429
    error = error_of(refused)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "1 jobs wait" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= LONGEST_WAIT_S

    pipeline.gate.set()
    assert first.answer().status_code == second.answer().status_code == 200
    assert live.generate("third").status_code == 200
    assert pipeline.ended == ["first", "second", "third"]


def test_a_full_queue_refuses_before_pictures_are_decoded(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live, queue_limit=1)
    laters = [live.generate_later("first")]
    pipeline.started.wait()
    laters.append(live.generate_later("second"))
    wait_until(lambda: live.depth == 1)
    assert live.generate("third", images=["not a picture"]).status_code == 429
    pipeline.gate.set()
    assert [later.answer().status_code for later in laters] == [200, 200]


def send_only(live: Live, prompt: str) -> socket.socket:
    """Send a request and keep its connection in hand, without reading the answer."""
    body = f'{{"prompt": "{prompt}"}}'.encode()
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.sendall(
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    return connection


def test_a_client_that_leaves_stops_its_running_job(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live)
    connection = send_only(live, "left")
    pipeline.started.wait()
    connection.close()
    wait_until(lambda: live.engine._scheduler.active[0].cancelled is not None)
    pipeline.gate.set()
    wait_until(lambda: pipeline.abandoned == ["left"])
    assert live.generate("next").status_code == 200
    assert pipeline.ended == ["next"]


def test_a_client_that_leaves_takes_its_waiting_job_along(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live)
    first = live.generate_later("first")
    pipeline.started.wait()
    connection = send_only(live, "left")
    wait_until(lambda: live.depth == 1)
    connection.close()
    wait_until(lambda: live.depth == 0)
    pipeline.gate.set()
    assert first.answer().status_code == 200
    assert live.generate("next").status_code == 200
    assert pipeline.ran == ["first", "next"]


def test_a_client_that_leaves_while_sending_costs_nothing(start_live: StartLive) -> None:
    live = start_live()
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.sendall(
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    connection.close()
    assert live.generate("next").status_code == 200
    assert live.pipeline.ran == ["next"]


def test_a_job_that_takes_too_long_is_cancelled(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live, request_timeout_s=0.05)
    answer = live.generate("slow")
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "timeout"
    assert answer.headers["x-should-retry"] == "false"
    pipeline.gate.set()
    wait_until(lambda: pipeline.abandoned == ["slow"])


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("fail", 500, "internal_error"),
        ("fault", 500, "device_fault"),
        ("oom", 507, "out_of_memory"),
    ],
)
def test_a_job_that_fails_is_answered_and_the_next_one_works(
    start_live: StartLive,
    caplog: pytest.LogCaptureFixture,
    prompt: str,
    status: int,
    code: str,
) -> None:
    live = start_live()
    answer = live.generate(prompt)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert live.generate("next").status_code == 200
    assert live.pipeline.ended == ["next"]
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert len(tracebacks) == (1 if prompt == "fail" else 0)


def test_out_of_memory_frees_memory_and_is_not_to_be_repeated(start_live: StartLive) -> None:
    live = start_live()
    assert live.generate("oom").headers["x-should-retry"] == "false"
    assert live.pipeline.runtime.released == 1
    assert live.generate("next").status_code == 200
    assert live.pipeline.runtime.released == 1


def test_out_of_memory_of_one_job_leaves_those_beside_it_alone(start_live: StartLive) -> None:
    pipeline = FakePipeline(slice_s_at_512=LONG_SLICE_S)
    live = start_live(pipeline)
    long = live.generate_later("long", width=512, height=512, steps=50)
    wait_until(lambda: len(pipeline.slices) > 2)
    failed = live.generate("oom", width=256, height=256)
    assert (failed.status_code, failed.headers["x-should-retry"]) == (507, "false")
    assert live.generate("small", width=64, height=64).status_code == 200
    pipeline.slice_s_at_512 = 0.0
    assert long.answer().status_code == 200
    assert pipeline.runtime.released == 1
    assert pipeline.ended == ["small", "long"]


def test_a_device_fault_shows_in_health_until_a_picture_comes_out(start_live: StartLive) -> None:
    live = start_live()
    with live.client() as client:
        assert client.get("/health").status_code == 200
        live.generate("fault")
        sick = client.get("/health")
        assert sick.status_code == 503
        assert sick.json()["status"] == "failed"
        error_of(sick)
        live.generate("next")
        assert client.get("/health").status_code == 200


def test_a_picture_that_cannot_be_packed_is_an_error_of_its_own(start_live: StartLive) -> None:
    live = start_live()
    answer = live.generate("unpackable")
    assert answer.status_code == 500
    assert "file" in error_of(answer)["message"]
    assert live.generate("next").status_code == 200


@pytest.mark.parametrize("prompt", ["a fox", "fail"])
def test_a_job_that_cannot_be_noted_is_answered(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no metrics today")

    live = start_live()
    expected = live.generate(prompt).status_code
    for name in ("completed", "failed"):
        monkeypatch.setattr(live.engine.metrics, name, refuse)
    assert live.generate(prompt).status_code == expected
    wait_until(lambda: live.engine.is_idle)


def test_a_job_whose_answer_cannot_be_made_is_answered_and_gives_its_place_back(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no answer today")

    live = start_live()
    with monkeypatch.context() as patched:
        patched.setattr(live.engine, "_packed", refuse)
        assert live.generate("first").status_code == 500
    wait_until(lambda: live.engine.is_idle)
    assert live.generate("next").status_code == 200


def test_what_the_model_refuses_names_the_request_field(start_live: StartLive) -> None:
    answer = start_live().generate("unfit")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "images"


def test_status_answers_while_a_job_runs(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live)
    later = live.generate_later("first")
    pipeline.started.wait()
    with live.client() as client:
        health = client.get("/health").json()
        assert (health["running"], health["queue_depth"]) == (1, 0)
        assert client.get("/ready").status_code == 200
    pipeline.gate.set()
    assert later.answer().status_code == 200


def test_many_clients_at_once_each_get_their_own_answer(start_live: StartLive) -> None:
    live = start_live(settings={"queue_limit": 100})
    laters = [live.generate_later(f"job {seed}", seed=seed) for seed in range(40)]
    answers = [later.answer() for later in laters]
    assert [answer.status_code for answer in answers] == [200] * 40
    assert [answer.json()["images"][0]["seed"] for answer in answers] == list(range(40))
    assert len({answer.json()["id"] for answer in answers}) == 40


def test_ending_refuses_new_and_waiting_jobs_and_finishes_the_running_one(
    start_live: StartLive,
) -> None:
    live, pipeline = blocked(start_live, shutdown_grace_s=60.0)
    first = live.generate_later("first")
    pipeline.started.wait()
    second = live.generate_later("second")
    wait_until(lambda: live.depth == 1)
    with live.client() as client:
        live.server.should_exit = True
        waiting = second.answer()
        assert waiting.status_code == 503
        assert error_of(waiting)["code"] == "shutting_down"
        assert int(waiting.headers["retry-after"]) == 60
        refused = client.post("/v1/generate", json={"prompt": "third"})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert client.get("/health").status_code == 200
    pipeline.gate.set()
    assert first.answer().status_code == 200
    assert pipeline.ran == ["first"]
    live.thread.join()
    assert live.server.is_engine_stopped


def test_a_job_that_outlives_the_grace_is_cancelled(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live, shutdown_grace_s=0.05)
    first = live.generate_later("first")
    pipeline.started.wait()
    live.server.should_exit = True
    wait_until(lambda: live.engine._scheduler.active[0].cancelled is not None)
    pipeline.gate.set()
    answer = first.answer()
    assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
    assert pipeline.abandoned == ["first"]


def test_a_second_signal_cuts_the_grace_short(start_live: StartLive) -> None:
    live, pipeline = blocked(start_live, shutdown_grace_s=3600.0)
    first = live.generate_later("first")
    pipeline.started.wait()
    live.server.handle_exit(15, None)
    wait_until(lambda: live.engine.status().state == "draining")
    live.server.handle_exit(15, None)
    wait_until(lambda: live.engine._scheduler.active[0].cancelled is not None)
    pipeline.gate.set()
    assert first.answer().status_code == 503


def test_a_slice_that_never_ends_does_not_hold_up_the_end(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.engine.LAST_SLICE_S", 0.05)
    live, pipeline = blocked(start_live)
    stuck = live.generate_later("stuck")
    pipeline.started.wait()
    assert live.engine.stop() is False
    assert error_of(stuck.answer())["code"] == "shutting_down"
    # Asked again, as at the end of the app's life, it does not wait again.
    assert live.engine.stop() is False
    pipeline.gate.set()
    assert live.engine._worker.join(60.0)


def test_cancelled_jobs_leave_no_trace_in_the_log_but_one_line(
    start_live: StartLive, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    live, pipeline = blocked(start_live)
    connection = send_only(live, "left")
    pipeline.started.wait()
    connection.close()
    wait_until(lambda: live.engine._scheduler.active[0].cancelled is not None)
    pipeline.gate.set()
    wait_until(lambda: live.engine.is_idle)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("app.eng")]
    assert [line for line in lines if "job" in line] == ["job failed code=client_left param=None"]


def test_keep_alive_connections_serve_many_requests(start_live: StartLive) -> None:
    live = start_live()
    with live.client() as client:
        for seed in range(5):
            answer = client.post("/v1/generate", json={"prompt": "again", "seed": seed})
            assert answer.json()["images"][0]["seed"] == seed


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_answered_not_cut_off(
    start_live: StartLive, is_announced: bool
) -> None:
    live = start_live(settings={"max_body_bytes": 5_000_000})
    chunk = bytes(1_000_000)
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.settimeout(PATIENCE_S)
        length = b"Content-Length: 10000000" if is_announced else b"Transfer-Encoding: chunked"
        connection.sendall(
            b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n%b\r\n\r\n" % length
        )
        # A client that reads nothing before it has sent everything.
        for _ in range(10):
            connection.sendall(chunk if is_announced else b"%x\r\n%b\r\n" % (len(chunk), chunk))
        if not is_announced:
            connection.sendall(b"0\r\n\r\n")
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    error = json.loads(body)["error"]
    assert error["code"] == "body_too_large" and "5000000 bytes" in error["message"]
    assert live.generate("next").status_code == 200


def test_a_client_that_asks_first_is_refused_before_it_sends(start_live: StartLive) -> None:
    live = start_live(settings={"max_body_bytes": 100_000})
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(
            b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 400000\r\nExpect: 100-continue\r\n\r\n"
        )
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_unknown_addresses_keep_the_shape_over_a_real_connection(start_live: StartLive) -> None:
    live = start_live()
    answer = httpx2.get(f"{live.url}/v1/nothing")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
