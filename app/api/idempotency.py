"""Idempotency-Key: a repeated request gets the first one's answer, and draws nothing.

A plain ASGI middleware around every route that draws while its client waits. The
first request with a key runs apart from its connection: a client that lost it repeats
the request, and joins. Answers of status 200 are kept; an error is told to all who
wait for it and then forgotten, so that a later repetition tries again. An answer that holds
addresses of pictures is kept in memory, for as long as each of them can be fetched.

Source: draft-ietf-httpapi-idempotency-key-header (the header, and 422 for another request).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import sqlite3
from collections import OrderedDict
from typing import NamedTuple

import anyio
import anyio.to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import left_while_sending
from app.api.picture_links import PictureLinks
from app.errors import InvalidRequestError, StorageError
from app.jobs.answers import KeptAnswer, KeptAnswers, RequestKey

logger = logging.getLogger(__name__)

KEY_HEADER = "idempotency-key"
REPLAYED_HEADER = "Idempotency-Replayed"
# Bodies up to this size are hashed on the event loop; it takes well under a millisecond.
SMALL_BODY_BYTES = 64 * 1024
# Printable ASCII; what libraries send is a UUID.
_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_EVENTS_TYPE = "text/event-stream"
_ERROR_EVENT = re.compile(rb"^event: error\b", re.MULTILINE)


class Idempotency:
    """See the module.

    Args:
        answers: those that are kept; None where nothing is.
        links: the pictures that answers hold addresses of; a route notes their names in
            ``request.state.links``.
        own_paths: addresses below which routes honour the header themselves.
    """

    def __init__(
        self,
        app: ASGIApp,
        answers: KeptAnswers | None,
        links: PictureLinks,
        own_paths: tuple[str, ...],
    ) -> None:
        self._app = app
        self._answers = answers
        self._links = links
        self._own_paths = own_paths
        self._running: dict[tuple[str, str], _FirstRequest] = {}
        self._linked: OrderedDict[tuple[str, str], _Linked] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer it with what the first one got."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or KEY_HEADER not in Headers(scope=scope)
            or scope["path"].startswith(self._own_paths)
        ):
            await self._app(scope, receive, send)
            return
        if self._answers is None:
            raise keys_are_off()
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            raise left_while_sending() from None
        key = await request_key(request, body)
        name = (key.client, key.key)
        first = self._running.get(name)
        is_replay = first is not None
        if first is None:
            # Here before anything is waited for, so that there is never a second one.
            first = self._running[name] = _FirstRequest(key)
            first.task = asyncio.create_task(
                self._run(self._answers, first, scope, _receive_of(body))
            )
        # The first one may wait for long, and holds its pictures elsewhere.
        del request, body
        first.key.check(key.fingerprint)
        await first.tell(send, is_replay=is_replay)

    async def _run(
        self, answers: KeptAnswers, first: _FirstRequest, scope: Scope, receive: Receive
    ) -> None:
        """Run the first request to its end, whoever still listens, and keep its answer."""
        try:
            try:
                kept = self._find_linked(first.key) or await _find(answers, first.key)
                if kept is None:
                    await self._app(scope, receive, first.hear)
                else:
                    for message in _messages_of(kept):
                        await first.hear(_as_replay(message))
            finally:
                await first.end()
            if kept is None and first.is_success:
                names = scope["state"].get("links")
                if names:
                    self._keep_linked(_Linked(first.key, first.answer(), tuple(names)))
                else:
                    await _keep(answers, first)
        finally:
            del self._running[first.key.client, first.key.key]

    def _find_linked(self, key: RequestKey) -> KeptAnswer | None:
        """The first answer to the request, if all that it points to is there.

        Raises:
            IdempotencyError: the key stands for another request.
        """
        found = self._linked.get((key.client, key.key))
        if found is None or not self._is_whole(found):
            return None
        found.key.check(key.fingerprint)
        return found.answer

    def _keep_linked(self, new: _Linked) -> None:
        """There are never more than pictures, and those are bounded; the oldest go first."""
        self._linked[new.key.client, new.key.key] = new
        self._linked.move_to_end((new.key.client, new.key.key))
        while self._linked and not self._is_whole(next(iter(self._linked.values()))):
            self._linked.popitem(last=False)

    def _is_whole(self, linked: _Linked) -> bool:
        return all(map(self._links.has, linked.names))


class _Linked(NamedTuple):
    """An answer that holds addresses of pictures of these names."""

    key: RequestKey
    answer: KeptAnswer
    names: tuple[str, ...]


class _FirstRequest:
    """A request that runs, and what it has answered so far."""

    def __init__(self, key: RequestKey) -> None:
        self.key = key
        self.task: asyncio.Task[None] | None = None
        self._messages: list[Message] = []
        self._is_ended = False
        self._changed = asyncio.Condition()

    @property
    def is_success(self) -> bool:
        """Whether the answer, which has ended, can stand for every repetition."""
        answer = self.answer()
        content_type = dict(answer.headers).get("content-type", "")
        is_stream = content_type.startswith(_EVENTS_TYPE)
        return answer.status == 200 and not (is_stream and _ERROR_EVENT.search(answer.body))

    def answer(self) -> KeptAnswer:
        """The whole answer."""
        start, *parts = self._messages
        headers = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]
        ]
        body = b"".join(part.get("body", b"") for part in parts)
        return KeptAnswer(start["status"], tuple(headers), body)

    async def hear(self, message: Message) -> None:
        """Take the next part of the answer."""
        async with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    async def end(self) -> None:
        """There is no more."""
        async with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    async def tell(self, send: Send, *, is_replay: bool) -> None:
        """Send the answer on, part by part as it comes.

        Raises:
            Exception: what the request ended with instead of an answer.
        """
        assert self.task is not None, "it runs before anybody listens"
        told = 0
        while not self._is_ended or told < len(self._messages):
            async with self._changed:
                while not self._is_ended and told == len(self._messages):
                    await self._changed.wait()
            for message in self._messages[told:]:
                told += 1
                # A copy: what is around this middleware adds its own to it.
                await send(_as_replay(message) if is_replay else dict(message))
        await asyncio.shield(self.task)


def keys_are_off() -> InvalidRequestError:
    """The refusal of a key that could not be honoured."""
    return InvalidRequestError(
        "Idempotency-Key cannot be honoured here, because nothing is kept (data_dir is off); "
        "leave the header out",
        param="Idempotency-Key",
        code="idempotency_off",
    )


async def request_key(request: Request, body: bytes) -> RequestKey:
    """Which request the header's key stands for. The body must be the request's own.

    Raises:
        InvalidRequestError: the key is no sound one.
    """
    key = request.headers[KEY_HEADER]
    if _KEY.fullmatch(key) is None:
        raise InvalidRequestError(
            "Idempotency-Key must have 1 to 255 characters of printable ASCII",
            param="Idempotency-Key",
        )
    if len(body) <= SMALL_BODY_BYTES:
        fingerprint = _fingerprint(request.scope["path"], request.headers, body)
    else:
        fingerprint = await anyio.to_thread.run_sync(
            _fingerprint, request.scope["path"], request.headers, body
        )
    return RequestKey(request.state.client, key, fingerprint)


def _fingerprint(path: str, headers: Headers, body: bytes) -> str:
    """Equal for equal requests only."""
    content_type = headers.get("content-type", "")
    boundary = _BOUNDARY.search(content_type)
    if boundary is not None:
        # Libraries draw a new one each time they send the same form.
        content_type = content_type.replace(boundary[1], "")
        body = body.replace(boundary[1].encode("latin-1"), b"")
    digest = hashlib.sha256()
    for part in (path, content_type, headers.get("accept", "")):
        digest.update(part.encode("latin-1", "replace") + b"\0")
    digest.update(body)
    return digest.hexdigest()


async def _find(answers: KeptAnswers, key: RequestKey) -> KeptAnswer | None:
    try:
        return await anyio.to_thread.run_sync(answers.find, key)
    except (sqlite3.Error, OSError) as error:
        logger.error("kept answers cannot be read: %s", error)
        raise StorageError("the answers to earlier requests cannot be read") from None


async def _keep(answers: KeptAnswers, first: _FirstRequest) -> None:
    try:
        await anyio.to_thread.run_sync(answers.keep, first.key, first.answer())
    except (sqlite3.Error, OSError) as error:
        # The picture is drawn and told; only its repetition will be drawn again.
        logger.error("an answer cannot be kept: %s", error)


def _receive_of(body: bytes) -> Receive:
    """A connection that has sent its body and is never closed."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await anyio.sleep_forever()
        raise AssertionError("for ever is over")

    return receive


def _messages_of(answer: KeptAnswer) -> list[Message]:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    return [
        {"type": "http.response.start", "status": answer.status, "headers": headers},
        {"type": "http.response.body", "body": answer.body, "more_body": False},
    ]


def _as_replay(message: Message) -> Message:
    """A copy that says so, if it is the answer's start."""
    copy = dict(message)
    if copy["type"] == "http.response.start":
        MutableHeaders(scope=copy)[REPLAYED_HEADER] = "true"
    return copy
