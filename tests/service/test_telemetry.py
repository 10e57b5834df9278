"""Log lines: their two forms, the request id, the line per job, and what they never hold."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys

import pytest

from app import telemetry
from app.telemetry import configure_logging
from tests.service.conftest import Start, StartLive, wait_until


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logged(line_format: str, stream: io.StringIO, message: str = "hello") -> str:
    configure_logging("info", line_format, stream)
    logging.getLogger("app.test").info(message)
    return stream.getvalue()


PLAIN = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO app\.test \[-\] hello\n"
HUMAN = r"\d\d:\d\d:\d\d \x1b\[32mINFO   \x1b\[0m hello\n"


@pytest.mark.parametrize(
    ("line_format", "stream", "pattern"),
    [
        ("plain", Terminal(), PLAIN),
        ("human", io.StringIO(), HUMAN),
        ("auto", io.StringIO(), PLAIN),
        ("auto", Terminal(), HUMAN),
    ],
)
def test_lines_are_human_on_a_terminal_and_plain_elsewhere(
    line_format: str, stream: io.StringIO, pattern: str
) -> None:
    assert re.fullmatch(pattern, logged(line_format, stream))


def test_the_request_id_is_on_the_line() -> None:
    stream = io.StringIO()
    configure_logging("info", "plain", stream)
    token = telemetry.request_id.set("req_7")
    logging.getLogger("app.test").info("inside")
    telemetry.request_id.reset(token)
    logging.getLogger("app.test").info("outside")
    inside, outside = stream.getvalue().splitlines()
    assert "[req_7] inside" in inside and "[-] outside" in outside


def test_a_message_cannot_forge_a_line() -> None:
    text = logged("plain", io.StringIO(), "x\n2026-01-01T00:00:00.000Z INFO forged\rforged")
    assert text.count("\n") == 2
    assert text.splitlines()[1].startswith("    2026")
    assert "\r" not in text


def test_a_message_cannot_command_the_terminal() -> None:
    text = logged("plain", io.StringIO(), "/\x1b]0;owned\x07\x9b31m\tpath")
    assert r"/\x1b]0;owned\x07\x9b31m" in text and "\t" in text
    assert "\x1b" not in text and "\x9b" not in text


def test_the_level_is_kept_and_tracebacks_follow() -> None:
    stream = io.StringIO()
    configure_logging("warning", "plain", stream)
    logging.getLogger("app.test").info("too low")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("app.test").exception("failed")
    assert "too low" not in stream.getvalue()
    assert "Traceback" in stream.getvalue() and "ValueError: boom" in stream.getvalue()


def test_configuring_again_replaces_the_handler() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("info", "plain", first)
    logged("plain", second)
    assert first.getvalue() == "" and second.getvalue().count("hello") == 1


WARNING = """
import sys, warnings
from app.telemetry import configure_logging
configure_logging("info", "plain", sys.stdout)
for i in range(3):
    warnings.warn_explicit(f"odd {i}", UserWarning, "x.py", i, "PIL.TiffImagePlugin")
warnings.warn_explicit("of the program", UserWarning, "y.py", 1, "fluxcore")
"""


def test_a_client_s_picture_cannot_fill_the_log() -> None:
    # In a process of its own: pytest catches warnings itself.
    told = subprocess.run(
        [sys.executable, "-c", WARNING], capture_output=True, text=True, check=True
    ).stdout
    assert "odd" not in told and "of the program" in told


def test_each_job_leaves_one_info_line_without_its_prompt(start_live: StartLive) -> None:
    stream = io.StringIO()
    live = start_live()
    configure_logging("info", "plain", stream)
    live.generate("a private fox", negative_prompt="a private crow", seed=7, steps=3, width=128)
    live.generate("a private fox", steps=0)
    live.generate("fail")
    wait_until(lambda: "job done" in stream.getvalue())
    text = stream.getvalue()
    (line,) = [line for line in text.splitlines() if "job done" in line]
    assert "private" not in text and "crow" not in text
    for part in ("INFO", "size=128x64", "n=1", "steps=3", "seed=7", "cache_hit=no", "[req_"):
        assert part in line
    for stage in ("queue", "text", "denoise", "decode", "pack", "total"):
        assert re.search(rf" {stage}_ms=\d+\.\d", line)
    assert "peak_bytes=12345" in line
    assert "job failed code=internal_error" in text


def test_json_lines_hold_the_fields_under_their_own_names(start_live: StartLive) -> None:
    stream = io.StringIO()
    live = start_live()
    configure_logging("info", "json", stream)
    live.generate("a private fox", seed=7, steps=3, width=128, height=64)
    live.generate("fail")
    wait_until(lambda: "job done" in stream.getvalue())
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "private" not in stream.getvalue()
    (done,) = [line for line in lines if line["message"] == "job done"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["time"])
    assert (done["level"], done["logger"]) == ("info", "app.engine.engine")
    assert done["request_id"].startswith("req_")
    assert (done["size"], done["seed"], done["cache_hit"]) == ("128x64", 7, False)
    assert isinstance(done["denoise_ms"], float)
    (failed,) = [line for line in lines if line["message"] == "job failed"]
    assert failed["code"] == "internal_error" and failed["level"] == "warning"
    (broken,) = [line for line in lines if "traceback" in line]
    assert "RuntimeError" in broken["traceback"]
    assert broken["request_id"] == failed["request_id"]


def test_a_field_cannot_take_the_place_of_another() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    logger = logging.getLogger("app.test")
    telemetry.log_event(logger, logging.INFO, "x", {"time": 1, "own": (1, 2)}, request_id="req_7")
    line = json.loads(stream.getvalue())
    assert line["time"] != 1
    assert (line["message"], line["own"], line["request_id"]) == ("x", [1, 2], "req_7")


def test_prompts_are_logged_at_debug(start: Start) -> None:
    stream = io.StringIO()
    client = start()
    configure_logging("debug", "plain", stream)
    client.post("/v1/generate", json={"prompt": "a fox"}, headers={"x-request-id": "mine"})
    (line,) = [line for line in stream.getvalue().splitlines() if "prompt: a fox" in line]
    assert "DEBUG" in line and "[mine]" in line
    assert "POST /v1/generate -> 200" in stream.getvalue()
