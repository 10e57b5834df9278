"""The event loop that the service runs on: asyncio's own, with short rounds.

Owns how much one round does. asyncio serves every socket that is ready before it looks at
its timers and at what other threads handed over: two hundred requests at once are half a
second in which nobody else is answered, though none of them takes 3 ms. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque

# Connections that are accepted in one round, as asyncio's ``backlog``.
ACCEPTED_A_ROUND = 1

_Ready = tuple[selectors.SelectorKey, int]


class RoundSelector(selectors.DefaultSelector):
    """Hands out the sockets that are ready one by one, each once before any again."""

    def __init__(self) -> None:
        super().__init__()
        self._held: deque[_Ready] = deque()

    def select(self, timeout: float | None = None) -> list[_Ready]:
        """At most one socket that is ready; waits only when none is left of those before."""
        if not self._held:
            self._held.extend(super().select(timeout))
        while self._held:
            key, events = self._held.popleft()
            # Not where it was closed or registered anew meanwhile, perhaps under the same
            # number: the system tells of that one by itself.
            if self.get_map().get(key.fileobj) is key:
                return [(key, events)]
        return []


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop for the server."""
    return asyncio.SelectorEventLoop(RoundSelector())
