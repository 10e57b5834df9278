"""HTTP requests to addresses that a client chose, without becoming its way into the network.

Whoever can make a service fetch an address can reach what only the service can: other
programs of this machine, the local network, a cloud's metadata. So every address that
a name stands for is checked, the connection goes to the very address that was checked
(a second lookup could tell another one: DNS rebinding), and each redirect is a new
request that is checked again. Environment variables for proxies are not looked at.
Knows nothing of pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

import h11

from fluxcore.version import __version__

DEFAULT_PORTS = {"http": 80, "https": 443}
# Below, other services than the web's are at home, which HTTP could be made to speak to.
FIRST_FREE_PORT = 1024
MAX_URL_CHARS = 2048
# Of one host's, how many are tried.
MAX_ADDRESSES = 4
READ_BYTES = 64 * 1024
REDIRECTS = frozenset({301, 302, 303, 307, 308})

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}")
# IPv6 networks whose last 32 bits are an IPv4 address: IPv4-compatible, and NAT64.
_ENDS_IN_IPV4 = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96"))
# A name server that never answers keeps a thread; it must not be one that others need.
_lookups = ThreadPoolExecutor(max_workers=4, thread_name_prefix="lookup")


class OutboundError(Exception):
    """The address is not asked, or did not answer as it should; says why, without a subject."""


@dataclass(frozen=True)
class Destinations:
    """What may be asked.

    Attributes:
        hosts: names, ``NAME`` or ``*.DOMAIN``; empty allows all.
        networks: networks that are allowed beside the public internet.
    """

    hosts: frozenset[str]
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

    @classmethod
    def of(cls, hosts: Iterable[str] = (), networks: Iterable[str] = ()) -> Destinations:
        """From the texts of the settings."""
        return cls(
            frozenset(host.lower() for host in hosts),
            tuple(ipaddress.ip_network(network) for network in networks),
        )

    def check_host(self, host: str) -> None:
        """Look at a name before it is looked up.

        Raises:
            OutboundError: it is none of those allowed.
        """
        parents = [f"*.{host[i + 1 :]}" for i, letter in enumerate(host) if letter == "."]
        if self.hosts and self.hosts.isdisjoint([host, *parents]):
            raise OutboundError(f"is on the host {host!r}, which the settings do not allow")

    def allows(self, address: _Address) -> bool:
        """Whether the address is a public one, or of a network that is allowed."""
        unwrapped = _unwrapped(address)
        if any(unwrapped in network or address in network for network in self.networks):
            return True
        return (
            unwrapped.is_global
            and not unwrapped.is_multicast
            and not unwrapped.is_reserved
            and not (isinstance(unwrapped, ipaddress.IPv6Address) and unwrapped.is_site_local)
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered; ``headers`` are lowercase names, the last value of each."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Target:
    """A checked URL."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def check_url(url: str, destinations: Destinations) -> None:
    """Look at an address that will be asked later, without looking its host up.

    Raises:
        OutboundError: it may not be asked.
    """
    destinations.check_host(_target(url).host)


async def exchange(
    method: str,
    url: str,
    destinations: Destinations,
    *,
    timeout_s: float,
    max_bytes: int,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    max_redirects: int = 0,
) -> Answer:
    """Ask an address and read its whole answer.

    Args:
        timeout_s: for everything together, redirects included.
        max_bytes: most bytes of the answer's body.
        max_redirects: how many are followed; a redirect beyond is an answer like any other.

    Raises:
        OutboundError: the address, or where it leads, may not be asked, or failed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for _ in range(max_redirects):
                target = _target(url)
                answer = await _ask(method, target, destinations, headers, body, max_bytes)
                if answer.status not in REDIRECTS or "location" not in answer.headers:
                    return answer
                try:
                    url = urljoin(url, answer.headers["location"])
                except ValueError:
                    raise OutboundError("leads to what is not a valid address") from None
                if target.scheme == "https" and _target(url).scheme != "https":
                    raise OutboundError("leads from https to an address without encryption")
            return await _ask(method, _target(url), destinations, headers, body, max_bytes)
    except TimeoutError:
        raise OutboundError(f"was not answered in full within {timeout_s:g} s") from None


async def _ask(
    method: str,
    target: _Target,
    destinations: Destinations,
    headers: Mapping[str, str] | None,
    body: bytes,
    max_bytes: int,
) -> Answer:
    """One request over a connection of its own."""
    destinations.check_host(target.host)
    addresses = await _addresses_of(target, destinations)
    reader, writer = await _connect(target, addresses)
    try:
        return await _talk(reader, writer, method, target, headers or {}, body, max_bytes)
    except h11.RemoteProtocolError:
        raise OutboundError("was not answered with valid HTTP") from None
    except OSError:
        raise OutboundError("broke off while it was read") from None
    finally:
        # Not close() alone: a server that does not end its side of TLS would be waited for.
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _connect(
    target: _Target, addresses: Iterable[str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of the checked addresses that takes one."""
    context = ssl.create_default_context() if target.scheme == "https" else None
    for address in addresses:
        try:
            return await asyncio.open_connection(
                address, target.port, ssl=context, server_hostname=target.host if context else None
            )
        except ssl.SSLError:
            raise OutboundError("is on a host whose certificate is not valid") from None
        except OSError:
            continue
    raise OutboundError("is on a host that cannot be reached")


async def _talk(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    target: _Target,
    headers: Mapping[str, str],
    body: bytes,
    max_bytes: int,
) -> Answer:
    connection = h11.Connection(h11.CLIENT)
    sent = {
        "Host": target.authority,
        "User-Agent": f"fluxd/{__version__}",
        # A packed answer could unpack to any size.
        "Accept-Encoding": "identity",
        "Connection": "close",
        **({"Content-Length": str(len(body))} if body else {}),
        **headers,
    }
    request = h11.Request(method=method, target=target.path, headers=list(sent.items()))
    for event in (request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    status, received, content = 0, {}, bytearray()
    while True:
        part = connection.next_event()
        if part is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_BYTES))
        elif isinstance(part, h11.Response):
            status = part.status_code
            received = {name.decode(): value.decode("latin-1") for name, value in part.headers}
            _check_head(received, max_bytes)
        elif isinstance(part, h11.Data):
            content += part.data
            if len(content) > max_bytes:
                raise OutboundError(f"has more than {max_bytes} bytes, the most allowed")
        elif isinstance(part, h11.EndOfMessage):
            return Answer(status, bytes(content), received)
        elif isinstance(part, h11.ConnectionClosed):
            raise OutboundError("was not answered")


def _check_head(headers: Mapping[str, str], max_bytes: int) -> None:
    length = headers.get("content-length", "0")
    if len(length) > 15 or int(length) > max_bytes:
        raise OutboundError(f"has more than {max_bytes} bytes, the most allowed")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise OutboundError("was answered in a packed form that was not asked for")


async def _addresses_of(target: _Target, destinations: Destinations) -> list[str]:
    """What the name stands for, looked up this once. All of it must be allowed."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.run_in_executor(
            _lookups, lambda: socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        )
    except (OSError, UnicodeError):
        raise OutboundError("is on a host that does not exist") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses:
        raise OutboundError("is on a host that does not exist")
    if not all(destinations.allows(ipaddress.ip_address(address)) for address in addresses):
        raise OutboundError("is on a private or reserved address, which the settings do not allow")
    return addresses[:MAX_ADDRESSES]


def _target(url: str) -> _Target:
    """A URL taken apart, strictly: what two readers could understand differently is refused."""
    if len(url) > MAX_URL_CHARS:
        raise OutboundError(f"is longer than {MAX_URL_CHARS} characters")
    if not all("!" <= character <= "~" for character in url) or "\\" in url:
        raise OutboundError("has characters that must be percent-encoded")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise OutboundError("is not a valid address") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise OutboundError("must begin with http:// or https://")
    if "@" in parts.netloc:
        raise OutboundError("must not hold a user name or password")
    if _HOST.fullmatch(host) is None:
        raise OutboundError("has no valid host")
    default = DEFAULT_PORTS[parts.scheme]
    port = default if port is None else port
    if port not in DEFAULT_PORTS.values() and port < FIRST_FREE_PORT:
        raise OutboundError(f"must not name a port below {FIRST_FREE_PORT} other than 80 and 443")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, host.rstrip("."), port, path)


def _unwrapped(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _ENDS_IN_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
