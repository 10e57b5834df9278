"""One TCP connection: how long a client may take, and how many there may be.

uvicorn waits for ever for the rest of a request line, of a body that no route reads,
and for a client that does not read its answer. Here each of these ends. The wait for
a body that a route does read is ``bodies``' business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import h11
from starlette.datastructures import MutableHeaders
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.errors import log_refusal, render
from app.api.middleware import REQUEST_ID_HEADER, RequestContext, new_request_id
from app.api.security.headers import add_security_headers
from app.errors import InvalidRequestError, TooManyConnectionsError
from app.metrics import Metrics
from app.settings import Settings

logger = logging.getLogger(__name__)

# Connections beyond the limit are told so, up to this many times it; then they are cut.
HARD_LIMIT = 2
BUSY_RETRY_S = 2.0
# A body may come in so many parts of any size; beyond, in parts of this size on average.
# Each part costs the event loop some 15 us, so that chunks of one byte would stop it.
FREE_PARTS = 2048
MIN_PART_BYTES = 256
# A part of an answer of up to so many bytes is copied behind its head: one message costs less than
# two. Fresh memory for 3 MB takes longer than to send them.
COPIED_BYTES = 128 * 1024


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with an end to every wait. Made by ``bounded_protocol``."""

    metrics: ClassVar[Metrics]
    max_connections: ClassVar[int]
    client_timeout_s: ClassVar[float]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._request_owed: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects."""
        limit = self.conn._max_incomplete_event_size
        # Given the transport alone, which lets go of this protocol at the end: else all of a
        # connection that is closed would stay until garbage is looked for.
        self.conn = _CountedConnection(h11.SERVER, limit, transport.write)
        super().connection_made(transport)
        # Be told of any byte that the system does not take at once, and when all are taken.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.max_connections:
            self.metrics.rejected(TooManyConnectionsError.code)
            if len(self.connections) > self.max_connections * HARD_LIMIT:
                transport.abort()
            else:
                self.app = RequestContext(_refuse_connection)
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        for timer in (self._request_owed, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        """An answer is written, if not sent; its request may still be arriving."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch_request()

    def pause_writing(self) -> None:
        """The client does not read as fast as is written."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """It has read everything."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP: say so in the one shape, if nothing has been said yet."""
        is_serving = self._is_serving()
        if is_serving:
            # The route waits for a body that will not come.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = InvalidRequestError("what came is not valid HTTP/1.1", code="invalid_http")
            log_refusal("-", error)
            answer = render(error)
            headers = MutableHeaders(raw=answer.raw_headers)
            headers[REQUEST_ID_HEADER] = new_request_id()
            headers["connection"] = "close"
            add_security_headers(headers)
            start = h11.Response(status_code=error.status, headers=headers.raw)
            for event in (start, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Answered as if no upgrade had been asked for; no client may fill the log with it."""

    def _is_serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_request(self) -> None:
        """While no request is being served, the rest of one must come in time."""
        if self._is_serving():
            if self._request_owed is not None:
                self._request_owed.cancel()
                self._request_owed = None
        elif self._request_owed is None:
            self._request_owed = self.loop.call_later(self.client_timeout_s, self._give_up)

    def _give_up(self) -> None:
        self._request_owed = None
        if not self._is_serving():
            logger.debug("a client did not finish its request in time")
            self.transport.close()

    def _watch_reading(self) -> None:
        """The client must read some of what waits for it before the time is over."""
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.client_timeout_s, self._check_reading)

    def _check_reading(self) -> None:
        # Whoever writes waits until all has been read. Only a large body may have been added,
        # behind a head that the system did not take at once: its client has the time once more.
        if self.transport.get_write_buffer_size() != self._unread_bytes:
            self._watch_reading()
        else:
            logger.debug("a client did not read its answer in time")
            self.transport.abort()


class _CountedConnection(h11.Connection):
    """Refuses a body in many tiny parts, and sends an answer's head together with a small body.

    Args:
        write: sends a head by itself.
    """

    def __init__(
        self,
        role: type[h11.SERVER],
        max_incomplete_event_size: int,
        write: Callable[[bytes], None],
    ) -> None:
        super().__init__(role, max_incomplete_event_size)
        self._write = write
        self._parts = 0
        self._part_bytes = 0
        self._head = b""

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]
        """What is to be written for a part of an answer.

        The head waits for the first part of the body where its length is known, so that both
        cost the system and the client one message. It goes out by itself before a large part,
        which would have to be copied, and where it is a stream's.
        """
        parts = self.send_with_data_passthrough(event)
        if parts is None:
            return None
        head, self._head = self._head, b""
        if len(parts) == 1 and len(parts[0]) > COPIED_BYTES:
            if head:
                self._write(head)
            return parts[0]
        output = b"".join((head, *parts))
        if isinstance(event, h11.Response) and any(
            n == b"content-length" for n, _ in event.headers
        ):
            self._head, output = output, b""
        return output

    def next_event(self) -> Any:
        """The next part of what came.

        Raises:
            h11.RemoteProtocolError: it is no HTTP, or not decently so.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._part_bytes = 0
            names = [name for name, _ in event.headers]
            if b"content-length" in names and b"transfer-encoding" in names:
                # A proxy before us may have read the other one, and see two requests in this.
                raise h11.RemoteProtocolError("a body of two lengths")
        elif isinstance(event, h11.Data):
            self._parts += 1
            self._part_bytes += len(event.data)
            if self._parts > FREE_PARTS and self._part_bytes < self._parts * MIN_PART_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many tiny parts")
        return event


def bounded_protocol(settings: Settings, counted_in: Metrics) -> type[H11Protocol]:
    """The protocol with the limits of the settings."""

    class Bounded(BoundedProtocol):
        metrics = counted_in
        max_connections = settings.max_connections
        client_timeout_s = settings.client_timeout_s

    return Bounded


async def _refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    error = TooManyConnectionsError(
        "as many connections are open as may be; try again", retry_after_s=BUSY_RETRY_S
    )
    error.headers["Connection"] = "close"
    log_refusal(scope["method"], error)
    await render(error)(scope, receive, send)
