"""How large a body may be, and how slow.

A body that announces too much is refused unread, one that turns out too large at
the byte that is too much. One that stops arriving, or trickles, is given up, so that
a client cannot hold a connection and half a body for ever. All of them together are
bounded, too: a few hundred clients with large bodies would fill any memory.
"""

from __future__ import annotations

import asyncio
import re
import time

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from app.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    InvalidRequestError,
    TooManyBytesError,
)

# What a client must send on average, beyond the first timeout's length. Slower than a modem.
MIN_BYTES_PER_S = 4096
# How long the rest of a body that is refused is read and dropped, so that the
# client comes to read the answer instead of finding the connection reset.
DISCARD_S = 2.0
# Bodies up to this size are not counted together.
SMALL_BYTES = 64 * 1024
SPACE_RETRY_S = 5.0
_LENGTH = re.compile(r"[0-9]{1,18}")


class BodySpace:
    """Memory that all bodies together may take until their pictures are decoded.

    Small ones are not counted: they cannot add up to much, and must not have to wait for
    large ones.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0

    def take(self, count: int) -> None:
        """Count so many more bytes.

        Raises:
            TooManyBytesError: there is no room for them.
        """
        if self._taken_bytes + count > self._limit_bytes:
            raise TooManyBytesError(
                "the bodies of the requests that are being answered take all the memory that they "
                "may; try again, or send smaller pictures",
                retry_after_s=SPACE_RETRY_S,
            )
        self._taken_bytes += count

    def give_back(self, count: int) -> None:
        """They are held no longer."""
        self._taken_bytes -= count


class HeldBytes:
    """What one body takes of the space."""

    def __init__(self, space: BodySpace) -> None:
        self._space = space
        self._count = 0

    def grow(self, count: int) -> None:
        """The body has come to so many bytes.

        Raises:
            TooManyBytesError: there is no room for them.
        """
        if count > SMALL_BYTES:
            self._space.take(count - self._count)
            self._count = count

    def drop(self) -> None:
        """Nobody holds the body any more."""
        self._space.give_back(self._count)
        self._count = 0


class BoundedBody:
    """One request's body. ``receive`` is the ASGI callable to hand on.

    Args:
        held: counts it among all bodies.
        max_bytes: the most that is read.
        timeout_s: the longest time without a further byte.
    """

    def __init__(
        self,
        headers: Headers,
        receive: Receive,
        held: HeldBytes,
        max_bytes: int,
        timeout_s: float,
    ) -> None:
        self._headers = headers
        self._receive = receive
        self._held = held
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._received_bytes = 0
        self._started_s: float | None = None
        self._is_complete = False

    def check_announced(self) -> None:
        """Look at Content-Length.

        Raises:
            InvalidRequestError, BodyTooLargeError
        """
        announced = self._headers.get("content-length")
        if announced is None:
            return
        if _LENGTH.fullmatch(announced) is None:
            raise InvalidRequestError("Content-Length must be a number of bytes")
        if int(announced) > self._max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """The next part of the body; after its end, whatever comes next, without a limit.

        Raises:
            BodyTooLargeError, BodyTimeoutError, TooManyBytesError
        """
        if self._is_complete:
            return await self._receive()
        message = await self._receive_in_time()
        if message["type"] != "http.request":
            return message
        self._received_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._received_bytes > self._max_bytes:
            raise self._too_large()
        self._held.grow(self._received_bytes)
        return message

    async def discard(self) -> bool:
        """Read and drop what is left of a body that nobody wants, for a short time.

        Returns:
            Whether the end was reached, so that the connection can be used again.
        """
        # A client that waits for "100 Continue" has sent nothing, and need not.
        if not self._is_complete and "expect" in self._headers and not self._received_bytes:
            return False
        try:
            async with asyncio.timeout(DISCARD_S):
                while not self._is_complete:
                    message = await self._receive()
                    self._is_complete = not message.get("more_body", False)
        except TimeoutError:
            return False
        return self._is_complete

    async def _receive_in_time(self) -> Message:
        now_s = time.monotonic()
        if self._started_s is None:
            self._started_s = now_s
        # The more a client has sent, the longer it may go on.
        end_s = self._started_s + self._timeout_s + self._received_bytes / MIN_BYTES_PER_S
        try:
            async with asyncio.timeout(min(self._timeout_s, end_s - now_s)):
                return await self._receive()
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body stopped arriving after {self._received_bytes} bytes, or came too slowly"
            ) from None

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self._max_bytes} bytes, the most allowed; "
            "send smaller or fewer pictures",
            headers={"Connection": "close"},
        )
