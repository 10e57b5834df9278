"""In how many messages an answer's head and body are sent."""

from __future__ import annotations

import h11
import pytest

from app.api.security.connection import COPIED_BYTES, _CountedConnection


def asked(written: list[bytes]) -> _CountedConnection:
    """A connection whose client waits for an answer."""
    connection = _CountedConnection(h11.SERVER, 2**16, written.append)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert isinstance(connection.next_event(), h11.Request)
    return connection


def told(body: bytes) -> h11.Response:
    return h11.Response(status_code=200, headers=[("Content-Length", str(len(body)))])


@pytest.mark.parametrize("size", [0, 1, COPIED_BYTES])
def test_a_small_body_is_sent_with_its_head(size: int) -> None:
    written: list[bytes] = []
    connection, body = asked(written), b"x" * size
    assert connection.send(told(body)) == b""
    sent = connection.send(h11.Data(data=body))
    assert (
        sent is not None and sent.startswith(b"HTTP/1.1 200") and sent.endswith(b"\r\n\r\n" + body)
    )
    assert not written
    assert connection.send(h11.EndOfMessage()) == b""


def test_a_large_body_is_sent_as_it_is_and_behind_its_head() -> None:
    written: list[bytes] = []
    connection, body = asked(written), b"x" * (COPIED_BYTES + 1)
    halves = body + body
    assert connection.send(told(halves)) == b""
    assert connection.send(h11.Data(data=body)) is body
    (head,) = written
    assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n")
    assert connection.send(h11.Data(data=body)) is body
    assert connection.send(h11.EndOfMessage()) == b""
    assert len(written) == 1


def test_a_stream_s_head_goes_out_by_itself() -> None:
    written: list[bytes] = []
    connection, body = asked(written), b"x" * (COPIED_BYTES + 1)
    head = connection.send(h11.Response(status_code=200, headers=[]))
    assert head is not None and head.startswith(b"HTTP/1.1 200")
    assert connection.send(h11.Data(data=body)) == b"20001\r\n" + body + b"\r\n"
    assert not written
