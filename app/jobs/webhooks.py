"""Webhooks: the end of a job, told to the address that its client named.

Owns who may be told, the signature and the repetitions. What is to be told is written
in the same transaction as the end itself, so that it is told at least once, also after
a crash; ``webhook-id`` tells a repetition from news.

Source: Standard Webhooks 1.0.0 (headers, signature and form of the secret).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import sqlite3
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from app.errors import InvalidRequestError
from app.jobs.database import Database
from app.outbound import Destinations, OutboundError, check_url, exchange
from app.settings import Settings, SettingsError

logger = logging.getLogger(__name__)

# How long after each failure the same is told again, in seconds; then it is given up.
REPEAT_AFTER_S = (5.0, 30.0, 120.0, 600.0, 3600.0)
TIMEOUT_S = 10.0
# Nobody reads what a receiver answers.
MAX_ANSWER_BYTES = 64 * 1024
# Receivers that are told at a time.
AT_ONCE = 8
# How often the thread looks for what is due when nobody wakes it, in seconds.
LONGEST_SLEEP_S = 5.0
GONE = 410

SECRET_PREFIX = "whsec_"
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one receiver is to be told."""

    id: str
    job_id: str
    url: str
    body: bytes
    attempts: int


class Webhooks:
    """See the module. Does nothing where the settings allow no host.

    Attributes:
        counts: webhooks that were told, attempts that failed, and webhooks given up.

    Raises:
        SettingsError: hosts are allowed, and there is no usable secret.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._destinations = Destinations.of(settings.webhook_hosts, settings.webhook_networks)
        self._is_on = bool(settings.webhook_hosts)
        self._secret = read_secret(settings.webhook_secret_file) if self._is_on else b""
        self._news = asyncio.Event()
        self.counts = {"told": 0, "failed": 0, "given_up": 0}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._telling: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="fluxd-webhooks", daemon=True)

    def check(self, url: str) -> None:
        """Refuse an address that would never be told anything.

        Raises:
            InvalidRequestError
        """
        if not self._is_on:
            raise InvalidRequestError(
                "webhook: this service tells nobody of a job's end (webhook_hosts is empty); "
                "watch the job's events instead",
                param="webhook",
            )
        try:
            check_url(url, self._destinations)
        except OutboundError as error:
            raise InvalidRequestError(f"webhook {error}", param="webhook") from None

    def start(self) -> None:
        """Begin to tell."""
        if self._is_on:
            self._loop = asyncio.new_event_loop()
            self._telling = self._loop.create_task(self._tell_all())
            self._thread.start()

    def wake(self) -> None:
        """There is something new to tell. Never blocks."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        """End; what has not been told is told after the next start."""
        if self._loop is None or self._telling is None:
            return
        self._loop.call_soon_threadsafe(self._telling.cancel)
        self._thread.join()
        self._loop.close()
        self._loop = None

    def _run(self) -> None:
        assert self._loop is not None and self._telling is not None, "see start"
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._telling)

    async def _tell_all(self) -> None:
        while True:
            self._news.clear()
            try:
                due = await asyncio.wrap_future(self._database.read(_due))
                await asyncio.gather(*(self._tell(delivery) for delivery in due))
            except sqlite3.Error as error:
                logger.error("webhooks cannot be read or recorded: %s", error)
                await asyncio.sleep(LONGEST_SLEEP_S)
                continue
            if not due:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LONGEST_SLEEP_S):
                        await self._news.wait()

    async def _tell(self, delivery: Delivery) -> None:
        """Tell one receiver once, and write down what came of it."""
        try:
            answer = await exchange(
                "POST",
                delivery.url,
                self._destinations,
                timeout_s=TIMEOUT_S,
                max_bytes=MAX_ANSWER_BYTES,
                headers=signed_headers(delivery, self._secret, int(time.time())),
                body=delivery.body,
            )
        except OutboundError as error:
            failure, is_hopeless = str(error), False
        else:
            is_told = 200 <= answer.status < 300
            failure = "" if is_told else f"was answered with {answer.status}"
            is_hopeless = answer.status == GONE
        self.counts["failed" if failure else "told"] += 1
        if failure and not is_hopeless and delivery.attempts < len(REPEAT_AFTER_S):
            at_s = time.time() + REPEAT_AFTER_S[delivery.attempts]
            await asyncio.wrap_future(self._database.write(partial(_repeat, delivery, at_s)))
            return
        await asyncio.wrap_future(self._database.write(partial(_remove, delivery)))
        if failure:
            self.counts["given_up"] += 1
            # Not the address: it may hold a secret.
            logger.warning("the webhook of %s is given up: it %s", delivery.job_id, failure)


def signed_headers(delivery: Delivery, secret: bytes, now_s: int) -> dict[str, str]:
    """What a receiver checks a webhook by."""
    signed = b"%s.%d.%s" % (delivery.id.encode(), now_s, delivery.body)
    digest = hmac.new(secret, signed, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(now_s),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode('ascii')}",
    }


def read_secret(path: Path | None) -> bytes:
    """The secret in a file, in the form ``whsec_`` and base64.

    Raises:
        SettingsError: there is none that can be used; says how to make one.
    """
    hint = (
        "make one: printf 'whsec_%s' \"$(openssl rand -base64 32)\" > FILE, "
        "and name it with webhook_secret_file"
    )
    if path is None:
        raise SettingsError(f"webhook_hosts needs a secret to sign with; {hint}")
    try:
        text = path.expanduser().read_text(encoding="ascii").strip()
        secret = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise SettingsError(f"webhook_secret_file {path}: {reason}; {hint}") from None
    except ValueError:
        text, secret = "", b""
    if not text.startswith(SECRET_PREFIX) or not (
        MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES
    ):
        raise SettingsError(
            f"webhook_secret_file {path} must hold {SECRET_PREFIX} and the base64 of "
            f"{MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} random bytes; {hint}"
        )
    return secret


def _due(connection: sqlite3.Connection) -> list[Delivery]:
    rows = connection.execute(
        "SELECT * FROM deliveries WHERE next_s <= ? ORDER BY next_s LIMIT ?",
        (time.time(), AT_ONCE),
    )
    return [
        Delivery(row["id"], row["job_id"], row["url"], row["body"].encode(), row["attempts"])
        for row in rows
    ]


def _repeat(delivery: Delivery, at_s: float, connection: sqlite3.Connection) -> None:
    connection.execute(
        "UPDATE deliveries SET attempts = attempts + 1, next_s = ? WHERE id = ?",
        (at_s, delivery.id),
    )


def _remove(delivery: Delivery, connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM deliveries WHERE id = ?", (delivery.id,))
