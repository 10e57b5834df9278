"""Server-sent events: their form on the wire, heartbeats, and a client that leaves.

Owns the answer; where the events come from is the generator's business, which is closed
as soon as nobody reads it.

Source: the HTML standard, 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

EVENTS_TYPE = "text/event-stream"
# A line that says nothing, so that proxies and clients see that the connection lives.
HEARTBEAT_S = 10.0
HEARTBEAT = b": alive\n\n"


def event_bytes(name: str, data: Mapping[str, Any]) -> bytes:
    """One event. JSON never holds a line break of its own, so one data line is enough."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode()


class EventStream(Response):
    """An answer that is written as its events come.

    Args:
        events: yields events in their form on the wire; it is closed when the client has
            left, and then sees ``CancelledError`` or ``GeneratorExit``.
    """

    media_type = EVENTS_TYPE

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(
            headers={
                "Cache-Control": "no-store",
                # nginx would keep the events until there are enough of them.
                "X-Accel-Buffering": "no",
            }
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the events end or the client has left."""
        left = asyncio.create_task(_left(receive))
        coming: asyncio.Task[bytes | None] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                coming = coming or asyncio.create_task(self._next())
                await asyncio.wait(
                    {coming, left}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if left.done():
                    return
                chunk: bytes | None = HEARTBEAT
                if coming.done():
                    chunk, coming = coming.result(), None
                if chunk is None:
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _end(coming)
            await self._events.aclose()
            await _end(left)

    async def _next(self) -> bytes | None:
        """The next event; None after the last."""
        return await anext(self._events, None)


async def _end(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
        # Looked at, so that nobody complains that it was not.
        if not task.cancelled():
            task.exception()


async def _left(receive: Receive) -> None:
    """Return once the connection is closed from the other side."""
    while (await receive())["type"] != "http.disconnect":
        pass
