"""Pictures by address: off by default; when on, no address leads where it must not."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from app.outbound import Destinations, OutboundError, exchange
from tests.service.conftest import PATIENCE_S, Start, error_of

LOOPBACK = "127.0.0.1"


def _png() -> bytes:
    target = io.BytesIO()
    Image.effect_noise((64, 96), 60).convert("RGB").save(target, "PNG")
    return target.getvalue()


PNG = _png()


class Handler(BaseHTTPRequestHandler):
    """One picture, redirects, and answers that go wrong in the ways that the paths name."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        match url.path:
            case "/cat.png":
                self._answer(200, PNG)
            case "/redirect":
                self._answer(302, b"", Location=parse_qs(url.query)["to"][0])
            case "/slow":
                self.server.gate.wait(PATIENCE_S)  # type: ignore[attr-defined]
            case "/drip":
                self.send_response(200)
                self.send_header("Content-Length", "10000")
                self.end_headers()
                while not self.server.gate.wait(0.02):  # type: ignore[attr-defined]
                    self.wfile.write(b"x")
            case "/big":
                self.send_response(200)
                self.send_header("Content-Length", str(10**12))
                self.end_headers()
            case "/endless":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                while not self.server.gate.is_set():  # type: ignore[attr-defined]
                    self.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
            case "/packed":
                self._answer(200, PNG, **{"Content-Encoding": "gzip"})
            case "/no-http":
                self.wfile.write(b"hello\r\n\r\n")
            case "/short":
                self.send_response(200)
                self.send_header("Content-Length", str(len(PNG)))
                self.end_headers()
                self.wfile.write(PNG[:100])
                self.close_connection = True
            case _:
                self._answer(404, b"the secret of this machine")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what some tests want."""


@dataclass
class Web:
    """A web server on loopback and the names that lead to it, or elsewhere."""

    server: Server
    names: dict[str, list[str]] = field(default_factory=dict)
    lookups: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def asked(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = self.server.asked  # type: ignore[attr-defined]
        return found

    def url(self, path: str, host: str = LOOPBACK, scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with Server((LOOPBACK, 0), Handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        server.gate = threading.Event()  # type: ignore[attr-defined]
        running = Web(server)
        real = socket.getaddrinfo

        def getaddrinfo(host: Any, *given: Any, **named: Any) -> Any:
            name = host.decode() if isinstance(host, bytes) else host
            if name not in running.names:
                return real(host, *given, **named)
            running.lookups.append(name)
            answers = running.names[name]
            # Each further lookup gets the next answer, as a rebinding name server gives it.
            address = answers.pop(0) if len(answers) > 1 else answers[0]
            return [found for part in address.split() for found in real(part, *given, **named)]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        server.gate.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join(PATIENCE_S)


def fetch(url: str, networks: tuple[str, ...] = (LOOPBACK,), **given: Any) -> bytes:
    """What is at an address."""
    wanted = {"timeout_s": PATIENCE_S, "max_bytes": 1_000_000, "max_redirects": 3, **given}
    hosts = wanted.pop("hosts", ())
    answer = asyncio.run(exchange("GET", url, Destinations.of(hosts, networks), **wanted))
    assert answer.status == 200
    return answer.body


def refusal(url: str, **given: Any) -> str:
    with pytest.raises(OutboundError) as refused:
        fetch(url, **given)
    return str(refused.value)


# --- through the service -------------------------------------------------------------------


def ask(client: Any, *images: str, **given: Any) -> Any:
    return client.post("/v1/generate", json={"prompt": "x", "images": list(images), **given})


def test_addresses_are_not_fetched_unless_the_settings_say_so(start: Start, web: Web) -> None:
    answer = ask(start(remote_image_networks=(LOOPBACK,)), web.url("/cat.png"))
    assert (answer.status_code, error_of(answer)["param"]) == (400, "images[0]")
    message = error_of(answer)["message"]
    assert "addresses are not fetched" in message and "remote_images" in message
    assert web.asked == []


def test_a_picture_is_fetched_where_the_settings_say_so(start: Start, web: Web) -> None:
    client = start(remote_images=True, remote_image_networks=(LOOPBACK,))
    answer = ask(client, web.url("/cat.png?a=1"))
    assert answer.status_code == 200
    assert answer.json()["params"]["references"] == 1
    assert web.asked == [("/cat.png?a=1", f"{LOOPBACK}:{web.port}")]


def test_no_private_address_is_asked_by_default(start: Start, web: Web) -> None:
    web.names["inside.example"] = [LOOPBACK]
    client = start(remote_images=True)
    for url in (
        web.url("/cat.png"),
        web.url("/cat.png", "localhost"),
        web.url("/cat.png", "inside.example"),
        web.url("/cat.png", "[::ffff:127.0.0.1]"),
        web.url("/cat.png", "2130706433"),
        web.url("/cat.png", "0x7f.1"),
        web.url("/cat.png", "0.0.0.0"),
    ):
        error = error_of(ask(client, url))
        assert "private or reserved address" in error["message"], url
        assert LOOPBACK not in error["message"]
    assert web.asked == []


def test_what_is_fetched_is_judged_like_what_is_sent(start: Start, web: Web) -> None:
    client = start(
        remote_images=True, remote_image_networks=(LOOPBACK,), remote_image_timeout_s=0.3
    )
    for path, says in (
        ("/nothing", "its host answered 404"),
        ("/short", "was not answered with valid HTTP"),
        ("/slow", "was not answered in full within 0.3 s"),
        ("/big", "bytes, the most allowed"),
    ):
        error = error_of(ask(client, web.url("/cat.png"), web.url(path)))
        assert error["param"] == "images[1]" and says in error["message"]
        assert "secret" not in error["message"]


def test_the_pictures_of_a_request_share_its_bytes(start: Start, web: Web) -> None:
    client = start(
        remote_images=True, remote_image_networks=(LOOPBACK,), max_body_bytes=len(PNG) + 100
    )
    assert ask(client, web.url("/cat.png")).status_code == 200
    error = error_of(ask(client, web.url("/cat.png"), web.url("/cat.png")))
    assert error["param"] == "images[1]" and "at most" not in error["message"]
    assert "has more than 100 bytes" in error["message"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a.example/x", "gopher://a.example"])
def test_other_schemes_are_never_fetched(start: Start, url: str) -> None:
    error = error_of(ask(start(remote_images=True), url))
    assert "addresses are not fetched" in error["message"]


# --- where an address may lead ---------------------------------------------------------------


def test_the_address_that_was_checked_is_the_one_that_is_asked(web: Web) -> None:
    """A name server that answers differently the second time is not asked a second time."""
    web.names["rebinding.example"] = [LOOPBACK, "127.0.0.2"]
    assert fetch(web.url("/cat.png", "rebinding.example")) == PNG
    assert web.lookups == ["rebinding.example"]
    assert web.asked == [("/cat.png", f"rebinding.example:{web.port}")]


def test_one_private_address_among_several_is_enough_to_refuse(web: Web) -> None:
    web.names["mixed.example"] = [f"{LOOPBACK} 169.254.169.254"]
    assert "private or reserved" in refusal(web.url("/cat.png", "mixed.example"))
    assert web.asked == []


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("http://169.254.169.254/latest/meta-data/", "private or reserved"),
        ("http://localhost.evil.example:8080/", "private or reserved"),
        ("http://[::1]/", "private or reserved"),
        ("//10.0.0.1/x", "private or reserved"),
        ("file:///etc/passwd", "must begin with http"),
        ("http://user:word@127.0.0.1/", "user name"),
        ("http://127.0.0.1:22/", "port below 1024"),
        ("http://127.0.0.1:6379\\@evil.example/", "percent-encoded"),
        ("http://[", "not a valid address"),
        ("http://127.0.0.1]/", "not a valid address"),
        ("/redirect?to=/redirect?to=/redirect%3Fto=/redirect", "expected"),
    ],
)
def test_each_redirect_is_checked_anew(web: Web, to: str, says: str) -> None:
    web.names["localhost.evil.example"] = ["127.0.0.2"]
    url = web.url(f"/redirect?to={quote(to)}")
    if says == "expected":
        # More redirects than are followed: the last is the answer, and it is no picture.
        destinations = Destinations.of((), (LOOPBACK,))
        answer = asyncio.run(
            exchange("GET", url, destinations, timeout_s=60, max_bytes=10, max_redirects=1)
        )
        assert answer.status == 302 and len(web.asked) == 2
    else:
        assert says in refusal(url)
        assert len(web.asked) == 1


def test_a_redirect_may_lead_to_what_is_allowed(web: Web) -> None:
    web.names["pictures.example"] = [LOOPBACK]
    to = web.url("/cat.png", "pictures.example")
    assert fetch(web.url(f"/redirect?to={to}")) == PNG
    assert fetch(web.url("/redirect?to=/cat.png")) == PNG
    # A host list holds for the hops, too.
    hosts = ("pictures.example",)
    assert "which the settings do not allow" in refusal(web.url(f"/redirect?to={to}"), hosts=hosts)
    start = web.url("/redirect?to=http://other.example/", "pictures.example")
    assert "'other.example', which" in refusal(start, hosts=hosts)


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("pictures.example", True),
        ("a.pictures.example", True),
        ("b.a.pictures.example", True),
        ("PICTURES.example", True),
        ("evilpictures.example", False),
        ("pictures.example.evil.example", False),
        ("example", False),
    ],
)
def test_hosts_can_be_listed(host: str, is_allowed: bool) -> None:
    destinations = Destinations.of(("pictures.example", "*.Pictures.example"), ())
    if is_allowed:
        destinations.check_host(host.lower())
    else:
        with pytest.raises(OutboundError):
            destinations.check_host(host)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.2.1",
        "192.168.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "100::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not Destinations.of().allows(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1"]
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert Destinations.of().allows(ipaddress.ip_address(address))


def test_networks_can_be_allowed_and_nothing_beside_them() -> None:
    destinations = Destinations.of((), ("192.168.1.0/24", "fd00:1::/64", "::1"))
    for address in ("192.168.1.7", "::ffff:192.168.1.7", "fd00:1::9", "::1"):
        assert destinations.allows(ipaddress.ip_address(address))
    for address in ("192.168.2.7", "127.0.0.1", "fd00:2::9", "169.254.169.254"):
        assert not destinations.allows(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "must begin with http"),
        ("cat.png", "must begin with http"),
        ("http://", "no valid host"),
        ("http:///x", "no valid host"),
        ("http://a b.example/", "percent-encoded"),
        ("http://a.example/\r\nX: y", "percent-encoded"),
        ("http://a.example/\x00", "percent-encoded"),
        ("http://bücher.example/", "percent-encoded"),
        ("http://a.example\\b.example/", "percent-encoded"),
        ("http://a.example:b/", "not a valid address"),
        ("http://a.example:99999/", "not a valid address"),
        ("http://[::1/", "not a valid address"),
        ("http://[fe80::1%25eth0]/", "no valid host"),
        ("http://user@a.example/", "user name"),
        ("http://a.example:25/", "port below 1024"),
        ("http://a.example:0/", "port below 1024"),
        ("http://-a.example/", "no valid host"),
        ("http://a.example/" + "x" * 3000, "longer than 2048"),
    ],
)
def test_addresses_that_two_readers_could_understand_differently_are_refused(
    url: str, says: str
) -> None:
    assert says in refusal(url)


# --- how much and how long -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/slow", "was not answered in full within 0.3 s"),
        ("/drip", "was not answered in full within 0.3 s"),
        ("/big", "has more than 100000 bytes"),
        ("/endless", "has more than 100000 bytes"),
        ("/packed", "packed form"),
        ("/no-http", "valid HTTP"),
        ("/short", "valid HTTP"),
    ],
)
def test_time_and_size_are_bounded(web: Web, path: str, says: str) -> None:
    started_s = time.monotonic()
    assert says in refusal(web.url(path), timeout_s=0.3 if "0.3" in says else 60, max_bytes=100_000)
    assert time.monotonic() - started_s < 30


def test_a_host_that_is_not_there_is_told_so(web: Web) -> None:
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    assert "cannot be reached" in refusal(f"http://{LOOPBACK}:{port}/")


# --- https -----------------------------------------------------------------------------------


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """Of a host that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    cert_path, key_path = directory / "cert.pem", directory / "key.pem"
    cert_path.write_bytes(made.public_bytes(pem))
    key_path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_path, key_path


def test_https_is_checked_against_the_name_though_the_address_is_pinned(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert_path, key_path = certificate(tmp_path, "pictures.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_path, key_path)
    web.server.socket = context.wrap_socket(web.server.socket, server_side=True)
    web.names |= {"pictures.example": [LOOPBACK], "other.example": [LOOPBACK]}
    url = web.url("/cat.png", "pictures.example", "https")
    # Nobody vouches for it yet.
    assert "certificate is not valid" in refusal(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert_path))
    assert fetch(url) == PNG
    other = web.url("/cat.png", "other.example", "https")
    assert "certificate is not valid" in refusal(other)
    downgrade = web.url("/redirect?to=http://pictures.example/", "pictures.example", "https")
    assert "without encryption" in refusal(downgrade)
