"""The service as a process: start, signals, exit status."""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import httpx2
import pytest

from app.jobs.files import JobFiles
from app.main import listen
from tests.service.conftest import PATIENCE_S, Later, error_of, wait_until
from tests.service.processes import FLUXD, ServerProcess

SLOW = (sys.executable, "-m", "tests.service.slow_server")


def generate(url: str, prompt: str, **given: object) -> httpx2.Response:
    body = {"prompt": prompt, "width": 64, "height": 64, **given}
    return httpx2.post(f"{url}/v1/generate", json=body, timeout=PATIENCE_S)


def running(url: str) -> int:
    count: int = httpx2.get(f"{url}/health", timeout=PATIENCE_S).json()["running"]
    return count


def wait_ready(url: str) -> None:
    wait_until(lambda: httpx2.get(f"{url}/ready", timeout=PATIENCE_S).status_code == 200)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_running_job_and_exits_0(number: int) -> None:
    with ServerProcess(*SLOW) as server:
        url = server.url()
        wait_ready(url)
        first = Later(lambda: generate(url, "first", steps=10))
        wait_until(lambda: running(url) == 1)
        # Longer than the first, so that it waits.
        second = Later(lambda: generate(url, "second", steps=50))
        wait_until(lambda: httpx2.get(f"{url}/health").json()["queue_depth"] == 1)
        server.signal(number)
        assert error_of(second.answer())["code"] == "shutting_down"
        assert first.answer().status_code == 200
        assert server.status() == 0, server.output
        assert "jobs that run have 30 s, a second signal ends them" in server.output
        assert "Traceback" not in server.output


def test_a_signal_while_idle_exits_0_with_connections_open() -> None:
    with ServerProcess(*SLOW) as server:
        url = server.url()
        wait_ready(url)
        with httpx2.Client(base_url=url) as client:
            assert client.get("/health").status_code == 200
            server.signal(signal.SIGTERM)
            assert server.status() == 0, server.output
            assert "jobs that run" not in server.output


def test_a_job_that_is_stuck_is_answered_and_left_behind() -> None:
    with ServerProcess(*SLOW, "0.1") as server:
        url = server.url()
        wait_ready(url)
        stuck = Later(lambda: generate(url, "stuck"))
        wait_until(lambda: running(url) == 1)
        server.signal(signal.SIGTERM)
        assert error_of(stuck.answer())["code"] == "shutting_down"
        assert server.status() == 1
        assert "leaving without it" in server.output
        assert "Traceback" not in server.output


def test_a_real_checkpoint_is_served_and_ended(tiny_checkpoint: Path) -> None:
    command = (*FLUXD, "serve", "--model", str(tiny_checkpoint), "--port", "0")
    with ServerProcess(*command, FLUXD_WARM_UP_SIZES="64x64", FLUXD_DEVICE="cpu") as server:
        url = server.url()
        wait_ready(url)
        answer = generate(url, "a private fox", seed=1)
        assert answer.status_code == 200
        assert answer.json()["model"] == tiny_checkpoint.name
        server.signal(signal.SIGTERM)
        assert server.status() == 0, server.output
        assert "job done size=64x64" in server.output
        assert f"ready model={tiny_checkpoint.name}" in server.output
        assert "private" not in server.output and "Traceback" not in server.output


def test_a_missing_checkpoint_is_one_clear_error_and_a_failure(tmp_path: Path) -> None:
    command = (*FLUXD, "serve", "--model", str(tmp_path / "nothing"), "--port", "0")
    with ServerProcess(*command) as server:
        assert server.status() == 1
        (error,) = [line for line in server.lines if " ERROR " in line]
        assert "nothing" in error
        assert "Traceback" not in server.output


def test_a_broken_checkpoint_is_one_clear_error_and_a_failure(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with ServerProcess(*FLUXD, "serve", "--model", str(tmp_path), "--port", "0") as server:
        assert server.status() == 1
        (error,) = [line for line in server.lines if " ERROR " in line]
        assert "model_index.json" in error
        assert "Traceback" not in server.output


def test_a_port_in_use_is_said_before_anything_is_loaded(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = (*FLUXD, "serve", "--model", str(tiny_checkpoint), "--port", port)
        started_s = time.monotonic()
        with ServerProcess(*command) as server:
            assert server.status() == 2
            assert server.output.startswith(f"fluxd: cannot listen on 127.0.0.1 port {port}: ")
            assert "--port" in server.output
        assert time.monotonic() - started_s < PATIENCE_S


def test_a_data_directory_in_use_is_said_before_anything_is_loaded(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    held = JobFiles(tmp_path)
    command = (*FLUXD, "serve", "--model", str(tiny_checkpoint), "--port", "0")
    with ServerProcess(*command, FLUXD_DATA_DIR=str(tmp_path)) as server:
        assert server.status() == 2
        (line,) = [line for line in server.lines if line.startswith("fluxd: ")]
        assert line.startswith(f"fluxd: data_dir {tmp_path}: is in use by another fluxd; ")
        assert "data_dir=off" in line and "Traceback" not in server.output
    held.close()


def test_answers_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
