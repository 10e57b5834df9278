"""Which web pages may use the service.

A browser sends what any page asks of any address, also of this machine's. It says
so: in ``Origin`` for what scripts send, in ``Sec-Fetch-Site`` for all the rest.
Programs send neither and are not concerned. No answer ever allows credentials, so
a page cannot use a login of somebody else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from app.errors import OriginNotAllowedError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DEFAULT_PORTS = {"http": "80", "https": "443"}
PREFLIGHT_MAX_AGE_S = 600
ALLOWED_METHODS = "GET, HEAD, POST, DELETE"
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<authority>[^/?#@\s]+)")
_PORT = re.compile(r":([0-9]{1,5})$")
_TOKENS = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_MAX_TOKENS_CHARS = 2048
_SHOWN_CHARS = 80


class OriginRules:
    """The origins in ``cors_origins`` and the service's own."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(origin.lower() for origin in allowed)
        self._any = "*" in self._allowed

    def check(self, method: str, headers: Headers, *, is_public_file: bool) -> str | None:
        """Judge one request.

        Args:
            is_public_file: whether any page may show what is asked for, as an image is shown.

        Returns:
            The value of ``Access-Control-Allow-Origin``, if the answer needs one.

        Raises:
            OriginNotAllowedError: a page asks that may not.
        """
        origin = headers.get("origin")
        if origin is not None:
            return self._check_origin(origin.lower(), headers.get("host"))
        site = headers.get("sec-fetch-site", "none").lower()
        is_of_another = site not in ("none", "same-origin")
        is_read = method in SAFE_METHODS
        # A link on another page may be followed; nothing else of it may reach us.
        is_link = is_read and headers.get("sec-fetch-mode", "").lower() == "navigate"
        if is_of_another and not is_link and not (is_read and is_public_file):
            raise OriginNotAllowedError(
                "a web page of another origin may not use this service; "
                "add its origin to the setting cors_origins if it should"
            )
        return None

    def _check_origin(self, origin: str, host: str | None) -> str | None:
        if self._any:
            return "*"
        if origin in self._allowed:
            return origin
        if host is not None and _is_own(origin, host.lower()):
            return None
        raise OriginNotAllowedError(
            f"a web page of the origin {origin[:_SHOWN_CHARS]!r} may not use this service; "
            "add the origin to the setting cors_origins if it should"
        )


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks what a page may send."""
    return (
        method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers
    )


def preflight_answer(headers: Headers, allowed_origin: str | None) -> Response:
    """The answer to a preflight of an origin that has been found allowed."""
    answer = Response(status_code=204)
    if allowed_origin is None:
        return answer
    answer.headers["Access-Control-Allow-Methods"] = ALLOWED_METHODS
    answer.headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)
    # No header of a request has a meaning here that its body could not have; SDKs send many.
    wanted = headers.get("access-control-request-headers", "")
    if len(wanted) <= _MAX_TOKENS_CHARS and _TOKENS.fullmatch(wanted):
        answer.headers["Access-Control-Allow-Headers"] = wanted
    # A page from the internet that asks a machine of the local network. Not for "*": that
    # origin was not named by anybody.
    if allowed_origin != "*" and headers.get("access-control-request-private-network") == "true":
        answer.headers["Access-Control-Allow-Private-Network"] = "true"
    return answer


def add_cors_headers(headers: MutableHeaders, allowed_origin: str) -> None:
    """Let the page that asked read the answer."""
    headers["access-control-allow-origin"] = allowed_origin
    # Without credentials, "*" means every header.
    headers["access-control-expose-headers"] = "*"
    headers["cross-origin-resource-policy"] = "cross-origin"
    if allowed_origin != "*":
        headers.add_vary_header("Origin")


def _is_own(origin: str, host: str) -> bool:
    """Whether the page was served by this service.

    Schemes are not compared: behind a proxy that ends TLS, only the page's is https.
    """
    match = _ORIGIN.fullmatch(origin)
    if match is None or match["scheme"] not in DEFAULT_PORTS:
        return False
    default = DEFAULT_PORTS[match["scheme"]]
    return _with_port(match["authority"], default) == _with_port(host, default)


def _with_port(authority: str, default: str) -> str:
    return authority if _PORT.search(authority) else f"{authority}:{default}"
