"""A ``fluxd serve`` of its own to be asked: started on a free port, waited for, and ended.

Owns the process and the one connection over which it is asked.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

HOST = "127.0.0.1"
START = "from app.cli import main; main()"
ANSWERED_S = 300.0
ENDED_S = 60.0
KEPT_S = 30.0
"""A connection that was idle for longer is made anew, before the service ends it (75 s)."""


class Answer(NamedTuple):
    """A picture as its client got it.

    Attributes:
        took_ms: from the request to all of the PNG file.
        stages_ms: how the service says that it spent them.
        is_cache_hit: whether the prompt's embeddings were at hand.
    """

    took_ms: float
    stages_ms: dict[str, float]
    png: bytes
    is_cache_hit: bool


class Service:
    """Runs from its making to the end of its ``with`` block.

    Exits the program where the service ends early, is not ready in time or refuses.
    """

    def __init__(self, checkpoint: Path, settings: Sequence[str], wait_s: float = 300.0) -> None:
        with socket.create_server((HOST, 0)) as free:
            self._port: int = free.getsockname()[1]
        command = [sys.executable, "-c", START, "serve", "--model", str(checkpoint)]
        command += ["--port", str(self._port)]
        for setting in settings:
            command += ["--set", setting]
        # Where the package is not installed, it is found from here.
        path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
        begun_s = time.monotonic()
        self._process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        try:
            self._wait_until_ready(begun_s + wait_s)
        except BaseException:
            self._end()
            raise
        self.ready_s = time.monotonic() - begun_s
        self._connection = HTTPConnection(HOST, self._port, timeout=ANSWERED_S)
        self._answered_s = time.monotonic()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._end()

    def draw(self, asked: dict[str, Any]) -> Answer:
        """One picture of ``POST /v1/generate``, over a connection that is kept alive."""
        if time.monotonic() - self._answered_s > KEPT_S:
            self._connection.close()
            self._connection.connect()
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        began_s = time.perf_counter()
        self._connection.request("POST", "/v1/generate", json.dumps(asked), headers)
        answer = self._connection.getresponse()
        content = answer.read()
        took_ms = (time.perf_counter() - began_s) * 1000
        self._answered_s = time.monotonic()
        if answer.status != HTTPStatus.OK:
            sys.exit(f"the service answered {answer.status}: {content[:500]!r}")
        is_hit = answer.headers["X-Fluxd-Cache-Hit"] == "true"
        return Answer(took_ms, stages_of(answer.headers["Server-Timing"]), content, is_hit)

    def _wait_until_ready(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                sys.exit(f"the service ended with status {self._process.returncode}")
            with suppress(OSError), closing(HTTPConnection(HOST, self._port, timeout=5)) as asked:
                asked.request("GET", "/ready")
                if asked.getresponse().status == HTTPStatus.OK:
                    return
            time.sleep(0.1)
        sys.exit("the service was not ready in time")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def stages_of(told: str) -> dict[str, float]:
    """Of a ``Server-Timing`` header, in ms."""
    parts = (part.split(";dur=") for part in told.split(", "))
    return {name: float(ms) for name, ms in parts}
