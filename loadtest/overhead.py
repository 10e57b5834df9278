"""What the service adds to a picture: a request's round trip less its device work and packing.

    python loadtest/overhead.py http://127.0.0.1:7861

Small pictures, one after the other over one kept-alive connection, by a client that does no
more than write to a socket and read from it. The first requests are left out; they warm things
up. Several addresses are asked in turn, which compares two versions under the same load of the
machine.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import time
from urllib.parse import urlsplit

DEVICE_AND_PACKING = ("text_ms", "references_ms", "denoise_ms", "decode_ms", "pack_ms")
_HEAD = re.compile(
    rb"HTTP/1.1 200 .*?content-length: ([0-9]+)\r\n.*?\r\n\r\n", re.DOTALL | re.IGNORECASE
)


def overhead_ms(connection: socket.socket, seed: int) -> float:
    """Of one request, in milliseconds."""
    asked = {"prompt": "a red circle", "seed": seed, "width": 128, "height": 128, "steps": 1}
    body = json.dumps(asked).encode()
    head = "POST /v1/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    began_s = time.perf_counter()
    connection.sendall(request)
    answer, match = b"", None
    while match is None or len(answer) < match.end() + int(match[1]):
        part = connection.recv(2**20)
        assert part, f"the connection was closed: {answer[:200]!r}"
        answer += part
        match = match or _HEAD.match(answer)
    took_ms = (time.perf_counter() - began_s) * 1000
    timings: dict[str, float] = json.loads(answer[match.end() :])["timings"]
    return took_ms - sum(timings.get(name, 0.0) for name in DEVICE_AND_PACKING)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--left-out", type=int, default=10)
    given = parser.parse_args()
    addresses = [urlsplit(url) for url in given.urls]
    connections = [socket.create_connection((a.hostname, a.port)) for a in addresses]
    found: list[list[float]] = [[] for _ in connections]
    for seed in range(given.requests):
        for connection, times in zip(connections, found, strict=True):
            times.append(overhead_ms(connection, seed))
    for url, times in zip(given.urls, found, strict=True):
        low, middle, high = statistics.quantiles(times[given.left_out :], n=4)
        print(f"{url}: median {middle:.2f} ms, quartiles {low:.2f} and {high:.2f}")


if __name__ == "__main__":
    main()
