"""What the service adds to a picture: a request's round trip less its device work.

    python loadtest/overhead.py http://127.0.0.1:7861
    python loadtest/overhead.py http://127.0.0.1:7861 --png --side 256 --steps 4

Small pictures, one after the other over one kept-alive connection, by a client that does no
more than write to a socket and read from it. Told apart: packing, and all the rest. The first
requests are left out; they warm things up. Several addresses are asked in turn, which compares
two versions under the same load of the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import time
from typing import NamedTuple
from urllib.parse import urlsplit

DEVICE = ("text", "references", "denoise", "decode")
_HEAD = re.compile(
    rb"HTTP/1.1 200 .*?content-length: ([0-9]+)\r\n.*?\r\n\r\n", re.DOTALL | re.IGNORECASE
)
_SPENT = re.compile(rb"([a-z]+);dur=([0-9.]+)")


class Overhead(NamedTuple):
    """Of one request, in milliseconds."""

    packing: float
    rest: float

    @property
    def both(self) -> float:
        return self.packing + self.rest


def overhead(connection: socket.socket, asked: dict[str, object], accept: str) -> Overhead:
    """Ask for one picture."""
    body = json.dumps(asked).encode()
    head = "POST /v1/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    began_s = time.perf_counter()
    connection.sendall(request)
    answer, match = bytearray(), None
    while match is None or len(answer) < match.end() + int(match[1]):
        part = connection.recv(2**20)
        assert part, f"the connection was closed: {answer[:200]!r}"
        answer += part
        match = match or _HEAD.match(bytes(answer))
    took_ms = (time.perf_counter() - began_s) * 1000
    if accept == "image/png":
        spent = {name.decode(): float(ms) for name, ms in _SPENT.findall(match[0])}
    else:
        timings = json.loads(answer[match.end() :])["timings"]
        spent = {name.removesuffix("_ms"): ms for name, ms in timings.items() if ms is not None}
    device_ms = sum(spent.get(name, 0.0) for name in DEVICE)
    return Overhead(spent["pack"], took_ms - device_ms - spent["pack"])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--png", action="store_true", help="a picture's bytes instead of JSON")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--left-out", type=int, default=10)
    given = parser.parse_args()
    asked = {
        "prompt": "a red circle",
        "width": given.side,
        "height": given.side,
        "steps": given.steps,
    }
    accept = "image/png" if given.png else "application/json"
    addresses = [urlsplit(url) for url in given.urls]
    connections = [socket.create_connection((a.hostname, a.port)) for a in addresses]
    found: list[list[Overhead]] = [[] for _ in connections]
    for seed in range(given.requests):
        for connection, times in zip(connections, found, strict=True):
            times.append(overhead(connection, {**asked, "seed": seed}, accept))
    for url, times in zip(given.urls, found, strict=True):
        for name in ("rest", "packing", "both"):
            all_ms = [getattr(one, name) for one in times[given.left_out :]]
            low, middle, high = statistics.quantiles(all_ms, n=4)
            print(
                f"{url} {name:8} median {middle:.2f} ms, quartiles {low:.2f} and {high:.2f}, "
                f"least {min(all_ms):.2f}"
            )


if __name__ == "__main__":
    main()
