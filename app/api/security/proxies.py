"""Who really asks, when a proxy forwards.

The X-Forwarded headers are believed of the proxies in the settings only; anybody
else could write there what he likes. A route that builds an address from its
request then builds the one that the client used.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Scope

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# One client usually has a whole network of this size.
IPV6_CLIENT_BITS = 64
# Addresses of which it is kept what they mean: most requests come from one of a few.
ADDRESSES_KEPT = 1024
# An IPv6 address with its zone, in brackets.
LONGEST_ADDRESS = 64


class TrustedProxies:
    """The networks in ``trusted_proxies``."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)

    def apply(self, scope: Scope) -> None:
        """Rewrite client, scheme and host of a request that a trusted proxy forwards."""
        if not self._networks or not self._is_trusted(_peer(scope)):
            return
        headers = Headers(scope=scope)
        forwarded = ",".join(headers.getlist("x-forwarded-for"))
        client = self._first_untrusted(forwarded)
        if client is not None:
            scope["client"] = (str(client), 0)
        if (scheme := _last(headers, "x-forwarded-proto")) in ("http", "https"):
            scope["scheme"] = scheme
        if host := _last(headers, "x-forwarded-host"):
            MutableHeaders(scope=scope)["host"] = host

    def _first_untrusted(self, forwarded: str) -> _Address | None:
        """The last hop that no trusted proxy vouches for; what stands before it is hearsay."""
        client = None
        for hop in reversed(forwarded.split(",")):
            client = _address(hop.strip())
            if client is None or not self._is_trusted(client):
                return client
        return client

    def _is_trusted(self, address: _Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def client_address(scope: Scope) -> str:
    """What tells one client from another where there are no keys."""
    address = _peer(scope)
    if address is None:
        return "unknown"
    if address.version == 6 and not address.is_loopback:
        return str(ipaddress.ip_network((address, IPV6_CLIENT_BITS), strict=False))
    return str(address)


def _peer(scope: Scope) -> _Address | None:
    client = scope.get("client")
    return None if client is None else _address(client[0])


def _address(text: str) -> _Address | None:
    # What a proxy passes on may be of any length, and is not to be kept then.
    return _parsed(text) if len(text) <= LONGEST_ADDRESS else None


@lru_cache(ADDRESSES_KEPT)
def _parsed(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    # A socket that listens on IPv6 shows IPv4 clients like this.
    mapped = address.ipv4_mapped if address.version == 6 else None
    return mapped or address


def _last(headers: Headers, name: str) -> str:
    values = headers.getlist(name)
    return values[-1].rpartition(",")[2].strip() if values else ""
