"""Clients that take their time, to hold what others need: each is given up, the rest is served."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from app.api.security.connection import BoundedProtocol
from app.telemetry import configure_logging
from tests.service.conftest import PATIENCE_S, Live, StartLive, wait_until

TIMEOUT_S = 0.4
CLOSE = b"\r\nConnection: close\r\n\r\n"
HEAD = (
    b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n"
)


def connected(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE_S)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def code_of(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head.lower()
    assert b"\r\nx-request-id: " in head.lower()
    assert b"\r\nx-content-type-options: nosniff" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    code: str = error["code"]
    return code


class Trickle:
    """Sends a byte now and then until the connection is closed under it."""

    def __init__(self, connection: socket.socket, byte: bytes) -> None:
        self._connection, self._byte = connection, byte
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        end_s = time.monotonic() + PATIENCE_S
        try:
            while time.monotonic() < end_s:
                self._connection.sendall(self._byte)
                time.sleep(TIMEOUT_S / 8)
        except OSError:
            return

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def live(start_live: StartLive) -> Live:
    return start_live(settings={"client_timeout_s": TIMEOUT_S})


@pytest.fixture
def log() -> io.StringIO:
    """What the operator sees."""
    stream = io.StringIO()
    configure_logging("info", "plain", stream)
    return stream


@pytest.mark.parametrize("sent", [b"", b"POST /v1/gen", HEAD[:-2]], ids=["none", "line", "head"])
def test_a_request_that_is_never_finished_is_dropped(live: Live, sent: bytes) -> None:
    with connected(live) as connection:
        connection.sendall(sent)
        assert all_of(connection) == b""
    assert live.generate("next").status_code == 200


def test_a_head_that_trickles_is_dropped(live: Live) -> None:
    with connected(live) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        trickle = Trickle(connection, b"x")
        assert all_of(connection) == b""
        trickle.join()


@pytest.mark.parametrize("is_trickling", [False, True])
def test_a_body_that_stops_or_trickles_is_answered_with_408(live: Live, is_trickling: bool) -> None:
    with connected(live) as connection:
        connection.sendall(HEAD + b"{")
        trickle = Trickle(connection, b" ") if is_trickling else None
        answer = all_of(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert code_of(answer) == "body_timeout"
        if trickle is not None:
            trickle.join()
    assert live.generate("next").status_code == 200


def test_a_body_that_nobody_reads_is_not_waited_for(live: Live) -> None:
    for line, status in (
        (b"POST /v1/nothing ", b"404"),
        (b"DELETE /health ", b"405"),
        (b"GET /health ", b"200"),
    ):
        with connected(live) as connection:
            connection.sendall(HEAD.replace(b"POST /v1/generate ", line))
            trickle = Trickle(connection, b"x")
            assert all_of(connection).startswith(b"HTTP/1.1 " + status)
            trickle.join()


def test_a_steady_slow_body_is_read(start_live: StartLive) -> None:
    live = start_live(settings={"client_timeout_s": 2.0})
    body = json.dumps({"prompt": "x" * 20_000, "width": 64, "height": 64}).encode()
    head = HEAD.replace(b"1000", b"%d" % len(body)).replace(
        b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"
    )
    with connected(live) as connection:
        connection.sendall(head)
        for start in range(0, len(body), 1000):
            connection.sendall(body[start : start + 1000])
            time.sleep(0.02)
        assert all_of(connection).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_its_answer_is_dropped(start_live: StartLive) -> None:
    live = start_live(settings={"client_timeout_s": TIMEOUT_S})
    body = json.dumps({"prompt": "x", "width": 64, "height": 64, "n": 10}).encode()
    with ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", live.port))
        # Pipelined requests make as much answer as is wanted.
        request = HEAD.replace(b"1000", b"%d" % len(body)) + body
        sender = threading.Thread(target=_send_all, args=(connection, request * 20_000))
        sender.start()
        wait_until(lambda: not live.server.server_state.connections)
        connection.close()
        sender.join(PATIENCE_S)
    assert live.generate("next").status_code == 200


@pytest.mark.parametrize("is_read", [False, True])
def test_a_body_behind_a_head_that_waits_is_not_taken_for_one_that_nobody_reads(
    is_read: bool,
) -> None:
    waiting = [300]
    told: list[str] = []
    protocol: Any = object.__new__(BoundedProtocol)
    protocol.client_timeout_s = TIMEOUT_S
    protocol.loop = SimpleNamespace(call_later=lambda *_: told.append("watched"))
    protocol.transport = SimpleNamespace(
        get_write_buffer_size=lambda: waiting[0], abort=lambda: told.append("given up")
    )
    protocol._watch_reading()
    waiting[0] += 3_000_000
    protocol._check_reading()
    assert told == ["watched", "watched"]
    waiting[0] -= 100_000 * is_read
    protocol._check_reading()
    assert told[2:] == ["watched" if is_read else "given up"]


def _send_all(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return


def test_connections_beyond_the_limit_are_told_so_and_beyond_twice_it_cut(
    start_live: StartLive,
) -> None:
    live = start_live(settings={"max_connections": 4})
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with ExitStack() as stack:
        for count in range(1, 9):
            connection = stack.enter_context(connected(live))
            wait_until(lambda count=count: len(live.server.server_state.connections) == count)
        connection.sendall(request)
        answer = all_of(connection)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: " in answer.lower()
        assert code_of(answer) == "too_many_connections"
        wait_until(lambda: len(live.server.server_state.connections) == 7)
        stack.enter_context(connected(live))
        with connected(live) as surplus:
            assert all_of(surplus) == b""
    refused = live.engine.metrics.registry.get_sample_value(
        "fluxd_rejections_total", {"reason": "too_many_connections"}
    )
    assert refused is not None and refused >= 5
    wait_until(lambda: not live.server.server_state.connections)
    assert live.generate("next").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    ],
    ids=[
        "words",
        "no host",
        "two hosts",
        "long",
        "name",
        "two lengths",
        "coding",
        "length and coding",
        "tls",
    ],
)
def test_what_is_no_http_is_answered_in_the_one_shape(
    live: Live, sent: bytes, log: io.StringIO
) -> None:
    with connected(live) as connection:
        connection.sendall(sent)
        answer = all_of(connection)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 "))
    assert code_of(answer) == "invalid_http"
    assert "WARNING" not in log.getvalue() and "ERROR" not in log.getvalue()


def test_a_body_that_turns_out_to_be_no_http_ends_its_request(live: Live, log: io.StringIO) -> None:
    head = HEAD.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked")
    with connected(live) as connection:
        connection.sendall(head + b'5\r\n{"pro\r\nnonsense\r\n')
        assert code_of(all_of(connection)) == "invalid_http"
    # The same after the answer has begun, or is even complete.
    with connected(live) as connection:
        connection.sendall(head.replace(b"/v1/generate", b"/nothing") + b"5\r\n")
        time.sleep(TIMEOUT_S / 4)
        connection.sendall(b"nonsense\r\nnonsense\r\n")
        all_of(connection)
    assert live.generate("next").status_code == 200
    assert "WARNING" not in log.getvalue() and "ERROR" not in log.getvalue()


def test_a_body_of_many_tiny_chunks_is_refused(live: Live) -> None:
    head = HEAD.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked")
    with connected(live) as connection:
        _send_all(connection, head + b"1\r\n \r\n" * 10_000)
        assert code_of(all_of(connection)) == "invalid_http"
    assert live.generate("next").status_code == 200


def test_no_client_fills_the_log_by_asking_for_an_upgrade(live: Live, log: io.StringIO) -> None:
    with connected(live) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\n"
            b"Upgrade: websocket\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert "WARNING" not in log.getvalue() and "ERROR" not in log.getvalue()


def test_bodies_of_all_clients_together_are_bounded(start_live: StartLive) -> None:
    live = start_live(settings={"max_bodies_bytes": 1_000_000, "max_body_bytes": 800_000})
    head = HEAD.replace(b"1000", b"700000")
    with connected(live) as first:
        first.sendall(head + b" " * 600_000)
        second = b""
        # The first one's bytes are counted as they are read.
        while not second.startswith(b"HTTP/1.1 503 "):
            with connected(live) as connection:
                _send_all(connection, head.replace(b"\r\n\r\n", CLOSE) + b" " * 700_000)
                second = all_of(connection)
        assert b"\r\nretry-after: " in second.lower() and b"too_many_bytes" in second
        # Small requests need no room, ...
        assert live.generate("x" * 20_000).status_code == 200
    # ... and what a client took that left is free again.
    third = b""
    while not third.startswith(b"HTTP/1.1 400 "):
        with connected(live) as connection:
            connection.sendall(head.replace(b"\r\n\r\n", CLOSE) + b" " * 700_000)
            third = all_of(connection)
    assert b"invalid_json" in third
