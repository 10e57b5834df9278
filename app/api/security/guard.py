"""The order of the rules: who asks, by which name, from which page, with which key, how often.

A plain ASGI middleware, so that its rules hold for addresses that do not exist, too.
What passes has ``request.state.client``: the key's name, or the peer's address; and
``request.state.drop_body``, to be called where the body is no longer held.
"""

from __future__ import annotations

import math

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import log_refusal, render
from app.api.page import PAGE_PREFIX
from app.api.security.bodies import BodySpace, BoundedBody, HeldBytes
from app.api.security.hosts import HostRules
from app.api.security.origins import (
    OriginRules,
    add_cors_headers,
    is_preflight,
    preflight_answer,
)
from app.api.security.proxies import TrustedProxies, client_address
from app.api.security.rates import Allowance, RateLimiter
from app.errors import AuthenticationError, RateLimitedError, ServiceError
from app.keys import ApiKey, KeyRing
from app.metrics import Metrics
from app.settings import Settings

# What needs no key: probes cannot send one, and the rest tells nothing about anybody.
PUBLIC_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
# Addresses that nobody can guess; whoever has one may fetch and show what is there.
PUBLIC_FILES = ("/files/",)


class Guard:
    """Lets a request through, or answers it."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._proxies = TrustedProxies(settings.trusted_proxies)
        self._hosts = HostRules(settings.allowed_hosts, settings.host)
        self._origins = OriginRules(settings.cors_origins)
        self._keys = KeyRing(settings.api_keys)
        self._rates = RateLimiter()
        # Room for one body of the largest size there always is.
        self._space = BodySpace(max(settings.max_bodies_bytes, settings.max_body_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._proxies.apply(scope)
        headers = Headers(scope=scope)
        held = HeldBytes(self._space)
        body = BoundedBody(
            headers,
            receive,
            held,
            self._settings.max_body_bytes,
            self._settings.client_timeout_s,
        )
        allowed_origin: str | None = None
        allowance: Allowance | None = None

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                if allowed_origin is not None:
                    add_cors_headers(answer, allowed_origin)
                if allowance is not None:
                    _add_rate_headers(answer, allowance)
                # An error may be found before the body was read.
                if message["status"] >= 400 and not await body.discard():
                    answer["connection"] = "close"
            await send(message)

        async def receive_guarded() -> Message:
            try:
                return await body.receive()
            except ServiceError as error:
                # Answered by whoever reads the body.
                self._metrics.rejected(error.code)
                raise

        try:
            self._hosts.check(headers.get("host"))
            allowed_origin = self._origins.check(
                scope["method"], headers, is_public_file=scope["path"].startswith(PUBLIC_FILES)
            )
            if is_preflight(scope["method"], headers):
                await preflight_answer(headers, allowed_origin)(scope, receive, send_guarded)
                return
            key = self._authenticate(scope["path"], headers)
            client = client_address(scope) if key is None else key.name
            scope.setdefault("state", {})["client"] = client
            # Called once nobody holds what was sent any more; at the latest at the end. Not a part
            # of ``body``, which holds the connection, which holds the scope: all three would stay
            # until garbage is looked for.
            scope["state"]["drop_body"] = held.drop
            allowance = self._count(scope["method"], client, key)
            body.check_announced()
        except ServiceError as error:
            self._metrics.rejected(error.code)
            log_refusal(scope["method"], error)
            await render(error)(scope, receive, send_guarded)
            return
        try:
            await self._app(scope, receive_guarded, send_guarded)
        except ServiceError as error:
            log_refusal(scope["method"], error)
            await render(error)(scope, receive, send_guarded)
        finally:
            held.drop()

    def _authenticate(self, path: str, headers: Headers) -> ApiKey | None:
        """The key that was sent.

        Raises:
            AuthenticationError: one is needed and missing, or it is unknown.
        """
        if not self._keys:
            return None
        sent = _sent_key(headers)
        if sent is None:
            if is_public(path):
                return None
            raise AuthenticationError(
                "an API key is required: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        key = self._keys.find(sent)
        if key is None and not is_public(path):
            raise AuthenticationError(
                "the API key is not known here; ask whoever runs this service for one",
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        return key

    def _count(self, method: str, client: str, key: ApiKey | None) -> Allowance | None:
        """Count what asks for work.

        Raises:
            RateLimitedError: this client has asked too often.
        """
        per_minute = self._settings.rate_limit_per_minute
        if key is not None and key.per_minute is not None:
            per_minute = key.per_minute
        if method != "POST" or per_minute == 0:
            return None
        allowance = self._rates.take(client, per_minute)
        if not allowance.is_allowed:
            error = RateLimitedError(
                f"at most {per_minute} requests a minute are allowed",
                retry_after_s=allowance.retry_s,
            )
            _add_rate_headers(error.headers, allowance)
            raise error
        return allowance


def is_public(path: str) -> bool:
    """Whether no key is asked for."""
    return path in PUBLIC_PATHS or path.startswith((*PUBLIC_FILES, PAGE_PREFIX))


def _sent_key(headers: Headers) -> str | None:
    """What stands in ``Authorization: Bearer``, else in ``x-api-key``; other schemes are no key."""
    scheme, _, sent = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and sent.strip():
        return sent.strip()
    return headers.get("x-api-key") or None


def _add_rate_headers(headers: MutableHeaders | dict[str, str], allowance: Allowance) -> None:
    headers["x-ratelimit-limit-requests"] = str(allowance.limit)
    headers["x-ratelimit-remaining-requests"] = str(allowance.remaining)
    headers["x-ratelimit-reset-requests"] = f"{math.ceil(allowance.reset_s)}s"
