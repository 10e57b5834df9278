"""How often one client may ask.

A bucket for each client holds a minute's worth of requests and fills up evenly, so
that a burst is served and a steady flood is not. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MINUTE_S = 60.0
# Clients that are remembered. Forgetting one that has not asked for longest fills its bucket.
MAX_CLIENTS = 10_000


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a client has left after a request.

    Attributes:
        is_allowed: whether this request may go on.
        limit: requests a minute.
        remaining: requests that would be served at once.
        reset_s: when the bucket is full again.
        retry_s: when the next request is served.
    """

    is_allowed: bool
    limit: int
    remaining: int
    reset_s: float
    retry_s: float


class RateLimiter:
    """Counts requests of each client."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, max_clients: int = MAX_CLIENTS
    ) -> None:
        self._clock = clock
        self._max_clients = max_clients
        # (tokens, when they were counted), least recently used first.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, per_minute: int) -> Allowance:
        """Count one request of a client that may make ``per_minute`` of them, at least one."""
        now_s = self._clock()
        per_second = per_minute / MINUTE_S
        tokens, counted_s = self._buckets.pop(client, (float(per_minute), now_s))
        tokens = min(float(per_minute), tokens + (now_s - counted_s) * per_second)
        is_allowed = tokens >= 1
        if is_allowed:
            tokens -= 1
        self._buckets[client] = (tokens, now_s)
        while len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        return Allowance(
            is_allowed=is_allowed,
            limit=per_minute,
            remaining=math.floor(tokens),
            reset_s=(per_minute - tokens) / per_second,
            retry_s=max(0.0, 1 - tokens) / per_second,
        )
