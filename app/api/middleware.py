"""What happens around every request: its id, its headers for browsers, and the last handler.

A plain ASGI middleware, the outermost one, so that its rules hold for unknown
routes and for failures of the framework too.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import telemetry
from app.api.errors import render
from app.api.security.headers import add_security_headers
from app.errors import InternalError, ShuttingDownError

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class RequestContext:
    """Gives each request an id and answers what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = _identity(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = identity
        token = telemetry.request_id.set(identity)
        started_s = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer[REQUEST_ID_HEADER] = identity
                add_security_headers(answer)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
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


def _identity(sent: str | None) -> str:
    """The client's id if it is a plain word, else a new one."""
    if sent is not None and _SANE_ID.fullmatch(sent):
        return sent
    return new_request_id()


def new_request_id() -> str:
    """An id that no other request has."""
    return f"req_{secrets.token_hex(16)}"
