"""What the load tools say of what they measured, and of command lines that they cannot follow."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection

import pytest

from app.keys import digest_of, new_key
from loadtest import flags, idle_gap
from loadtest.run import Seen, quantile_of
from loadtest.served import Service
from tests.service.conftest import StartLive
from tests.service.processes import ROOT, environment


def tool(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "loadtest" / program), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def seen(outcomes: dict[str, int], latencies_s: list[float]) -> Seen:
    server = {"pictures": 1.0, "device_busy_s": 1.0}
    waits_s = [0.0] * len(latencies_s)
    return Seen("Server", 1, 1.0, 10.0, outcomes, latencies_s, waits_s, server)


@pytest.mark.parametrize(
    ("count", "quantile", "expected"),
    [(100, 0.99, 99), (100, 0.5, 50), (2, 0.5, 1), (3, 0.5, 2), (1, 0.99, 1), (99, 0.99, 99)],
)
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(
    count: int, quantile: float, expected: float
) -> None:
    assert quantile_of([float(value) for value in range(1, count + 1)], quantile) == expected
    assert quantile_of([], quantile) is None


def test_99_of_100_in_time_are_enough() -> None:
    assert seen({"answered": 100}, [0.1] * 99 + [5.0]).meets(1.0)
    assert not seen({"answered": 100}, [0.1] * 98 + [5.0] * 2).meets(1.0)


@pytest.mark.parametrize("outcome", ["failed", "wrong", "refused"])
def test_a_rate_at_which_most_are_not_answered_is_not_kept_up(outcome: str) -> None:
    assert not seen({"answered": 10, outcome: 90}, [0.1] * 10).meets(1.0)
    assert not seen({outcome: 5}, []).meets(1.0)


def test_no_percentile_lies_above_the_largest_gap(capsys: pytest.CaptureFixture[str]) -> None:
    idle_gap.tell("it", [(1.0, True), (2.0, True), (2.1, True)], 100.0, 3)
    told = capsys.readouterr().out
    p90, most = (float(told.split(name)[1].split(",")[0]) for name in ("p90 ", "most "))
    assert p90 <= most


def test_a_service_that_wants_a_key_is_told_apart_from_none(start_live: StartLive) -> None:
    live = start_live(settings={"api_keys": (f"bob:{digest_of(new_key())}",)})
    done = tool("run.py", live.url)
    assert done.returncode == 2 and "401" in done.stderr and "key" in done.stderr, done.stderr


def test_a_connection_that_was_idle_for_long_is_made_anew(
    start_live: StartLive, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start_live()
    service = Service.__new__(Service)
    service._connection = HTTPConnection("127.0.0.1", live.port, timeout=30)
    service._answered_s = time.monotonic()
    with closing(service._connection) as connection:
        assert service.draw({"prompt": "a fox"}).png
        first = connection.sock
        assert service.draw({"prompt": "a fox"}).png
        assert connection.sock is first, "it is kept"
        first.shutdown(socket.SHUT_RDWR)
        monkeypatch.setattr("loadtest.served.KEPT_S", -1.0)
        assert service.draw({"prompt": "a fox"}).png


def test_idle_gaps_are_not_waited_for_without_a_model() -> None:
    done = tool("idle_gap.py", "--model", "nowhere")
    assert done.returncode == 1 and "could not be loaded" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("compare_diffusers.py", "nowhere"), "no model_index.json"),
        (("compare_diffusers.py", ".", "--sizes", "70"), "multiple of 16"),
        (("time_to_ready.py", ".", "--data", ".", "--set", "foo"), "must be NAME=VALUE"),
        (("idle_gap.py", "--jobs", "6"), "must be more than 6"),
        (("run.py", "http://127.0.0.1:9"), "start fluxd serve first"),
        (("run.py", "http://127.0.0.1:9", "--seconds", "0"), "a number from 1 on"),
    ],
)
def test_a_command_line_is_refused_before_anything_is_loaded(
    command: tuple[str, ...], told: str
) -> None:
    done = tool(*command)
    assert done.returncode == 2 and told in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("parse", "right", "wrong"),
    [
        (flags.assignment, "port=b=c", "port"),
        (flags.count, "3", "0"),
        (flags.count, "1", "-1"),
        (flags.side_px, "64", "70"),
        (flags.side_px, "2048", "2064"),
        (flags.side_px, "64", "48"),
        (flags.seconds, "0.5", "-1"),
        (flags.seconds, "0.0", "nan"),
    ],
)
def test_a_wrong_value_is_told(parse: Callable[[str], object], right: str, wrong: str) -> None:
    assert str(parse(right)) == right
    with pytest.raises(argparse.ArgumentTypeError, match=f"got '{wrong}'"):
        parse(wrong)


def test_what_is_no_setting_is_refused_by_name() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="'foo' is no setting"):
        flags.assignment("foo=1")


def test_a_setting_is_named_as_the_command_takes_it() -> None:
    assert flags.assignment("warm-up-sizes=64x64") == "warm_up_sizes=64x64"


def test_the_last_assignment_of_a_name_counts() -> None:
    assert flags.as_settings(["a=1", "b=x=y", "a=2"]) == {"a": "2", "b": "x=y"}
