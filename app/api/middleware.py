"""What happens around every request: its id, its size limit, and the last handler.

A plain ASGI middleware, the outermost one, so that its rules hold for unknown
routes and for failures of the framework too.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import telemetry
from app.api.errors import render
from app.errors import (
    BodyTooLargeError,
    InternalError,
    InvalidRequestError,
    ServiceError,
    ShuttingDownError,
)

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_LENGTH = re.compile(r"[0-9]{1,18}")
# How long the rest of a body that is too large is read and dropped, so that the
# client comes to read the answer instead of finding the connection reset.
DISCARD_S = 2.0


class RequestContext:
    """Gives each request an id, bounds its body and answers what nobody else caught."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        identity = _identity(headers.get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = identity
        token = telemetry.request_id.set(identity)
        started_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = identity
            await send(message)

        try:
            await self._check_announced(headers, receive)
            await self._app(scope, self._bounded(receive), send_with_id)
        except ServiceError as error:
            await render(error)(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # The server ends while a body is still being sent.
            task = asyncio.current_task()
            if status or task is None:
                raise
            task.uncancel()
            ending = ShuttingDownError("the service is shutting down", retry_after_s=1)
            await render(ending)(scope, receive, send_with_id)
        except Exception:
            logger.exception("unhandled error in %s %s", scope["method"], scope["path"])
            if status:
                raise
            unknown = InternalError("the service failed; its log says why")
            await render(unknown)(scope, receive, send_with_id)
        finally:
            logger.debug(
                "%s %s -> %d in %.1f ms",
                scope["method"],
                scope["path"],
                status,
                (time.monotonic() - started_s) * 1000,
            )
            telemetry.request_id.reset(token)

    async def _check_announced(self, headers: Headers, receive: Receive) -> None:
        announced = headers.get("content-length")
        if announced is None:
            return
        if _LENGTH.fullmatch(announced) is None:
            raise InvalidRequestError("Content-Length must be a number of bytes")
        if int(announced) > self._max_body_bytes:
            # A client that waits for "100 Continue" has sent nothing yet.
            if "expect" not in headers:
                await _discard(receive, int(announced))
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` that counts, for bodies that announce no length."""
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body_bytes:
                    if message.get("more_body", False):
                        await _discard(receive, self._max_body_bytes)
                    raise self._too_large()
            return message

        return bounded_receive

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than {self._max_body_bytes} bytes, the most allowed; "
            "send smaller or fewer pictures",
            headers={"Connection": "close"},
        )


def _identity(sent: str | None) -> str:
    """The client's id if it is a plain word, else a new one."""
    if sent is not None and _SANE_ID.fullmatch(sent):
        return sent
    return f"req_{uuid.uuid4().hex}"


async def _discard(receive: Receive, limit_bytes: int) -> None:
    """Read and drop what is left of a body, within bounds."""
    dropped = 0
    try:
        async with asyncio.timeout(DISCARD_S):
            while dropped <= limit_bytes:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
