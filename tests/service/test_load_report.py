"""The load test itself: each mode against a real service, and what the report says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import StartLive, wait_until
from tests.service.fake_pipeline import FakePipeline
from tests.service.processes import ROOT, environment

# Not imported: it would put its own sockets and threads into this process.
pytestmark = pytest.mark.skipif(find_spec("locust") is None, reason="needs the extra 'load'")

MODES = ["SingleStream", "Offline", "Server", "Mixed", "Leaving"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "loadtest" / "run.py"), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_every_mode_is_driven_and_reported(start_live: StartLive, tmp_path: Path) -> None:
    live = start_live(FakePipeline(slice_s_at_512=0.1))
    done = run(
        *(live.url, "--seconds", 1, "--side", 128, "--steps", 2, "--users", 3),
        *("--rates", 8, "--output", tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "report.json").read_text())
    modes: dict[str, Any] = {seen["mode"]: seen for seen in whole["modes"]}
    assert list(modes) == MODES
    for mode, seen in modes.items():
        assert seen["outcomes"]["answered"] >= 1, mode
        assert set(seen["outcomes"]) <= {"answered", "left", "refused"}, mode
        assert len(seen["latencies_s"]) == seen["outcomes"]["answered"] == len(seen["waits_s"])
        assert seen["server"]["pictures"] >= seen["outcomes"]["answered"], mode
        assert seen["server"]["device_busy_s"] > 0
    assert modes["Server"]["rate"] == 8
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == whole["summary"]
    assert summary["single_stream_p50_s"] > 0 and summary["offline_pictures_per_s"] > 0
    assert summary["offline_of_device_time"] > 0 and summary["wrong"] == 0
    page = (tmp_path / "report.html").read_text()
    assert all(mode in page for mode in MODES) and "data:image/png;base64," in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    wait_until(lambda: live.engine.is_idle)


@pytest.mark.parametrize("url", ["http://192.0.2.1:7861", "http://example.org", "fluxd"])
def test_only_this_machine_is_loaded(url: str) -> None:
    refused = run(url)
    assert refused.returncode == 2 and "loopback" in refused.stderr
