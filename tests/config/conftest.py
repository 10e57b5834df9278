"""One real service that has done some work, as the operators' files see it."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.config.promql import Exposed
from tests.docs.served import Served, serve

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
PATIENCE_S = 60.0


def _ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        found: bytes = answer.read()
        return found


@pytest.fixture(scope="session")
def running(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service."""
    data = tmp_path_factory.mktemp("data")
    with serve(tiny_checkpoint, data_dir=str(data), warm_up_sizes="64x64") as service:
        yield service


@pytest.fixture(scope="session")
def exposed(running: Served) -> Exposed:
    """Its metrics after it has drawn pictures, previews and a kept job."""
    small = {"width": 64, "height": 64}
    _ask(f"{running.url}/v1/generate", {"prompt": "one", "stream": True, "previews": 1, **small})
    kept = json.loads(_ask(f"{running.url}/v1/jobs", {"prompt": "two", **small}))
    deadline_s = time.monotonic() + PATIENCE_S
    while json.loads(_ask(f"{running.url}/v1/jobs/{kept['id']}"))["status"] != "completed":
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return Exposed.read(_ask(f"{running.url}/metrics").decode())
