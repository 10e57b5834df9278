"""From starting the service to being ready, and then from request to PNG, size by size.

    python loadtest/time_to_ready.py CHECKPOINT --sizes 256x256 512x512 --data DIR \\
        --set cuda_graphs=24

Starts ``fluxd serve`` with these sizes to warm up, waits for it, and asks for pictures one
after the other over one connection, each with a prompt that is new. Without ``--pause`` a GPU
has no rest, and may have to lower its clock. What a start compiled lies in DIR and is found by
the next one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
START = "from app.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x512", "1024x1024"])
    parser.add_argument("--runs", type=int, default=15, help="pictures of each size")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each request")
    parser.add_argument("--data", type=Path, required=True, help="directory of the service")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE; repeatable")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds until ready, at most")
    args = parser.parse_args()
    with socket.create_server((HOST, 0)) as free:
        port: int = free.getsockname()[1]
    chosen = [f"warm_up_sizes={','.join(args.sizes)}", f"data_dir={args.data}", *args.set]
    command = [sys.executable, "-c", START, "serve", "--model", str(args.checkpoint)]
    command += ["--port", str(port)]
    for setting in chosen:
        command += ["--set", setting]
    # Where the package is not installed, it is found from here.
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    begun_s = time.monotonic()
    service = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        wait_until_ready(service, port, args.wait)
        found: dict[str, Any] = {"ready_s": time.monotonic() - begun_s, "sizes": {}}
        print(f"ready after {found['ready_s']:.1f} s", flush=True)
        for size in args.sizes:
            found["sizes"][size] = ask(port, size, args.runs, args.pause)
            told = ", ".join(f"{name} {ms:.1f}" for name, ms in found["sizes"][size].items())
            print(f"{size}: {told} ms", flush=True)
    finally:
        service.terminate()
        service.wait(60)
    print(json.dumps(found))


def wait_until_ready(service: subprocess.Popen[bytes], port: int, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if service.poll() is not None:
            sys.exit(f"the service ended with status {service.returncode}")
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"not ready after {limit_s:.0f} s")


def ask(port: int, size: str, runs: int, pause_s: float) -> dict[str, float]:
    """Medians in ms: request to PNG as the client sees it, and what the service says of these."""
    connection = http.client.HTTPConnection(HOST, port, timeout=300)

    def draw(number: int) -> dict[str, float]:
        body = {"prompt": f"picture {number} of a lighthouse, {size}", "size": size}
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        time.sleep(pause_s)
        began_s = time.perf_counter()
        connection.request("POST", "/v1/generate", json.dumps({**body, "seed": number}), headers)
        answer = connection.getresponse()
        content = answer.read()
        took_ms = (time.perf_counter() - began_s) * 1000
        if answer.status != 200:
            sys.exit(f"the service answered {answer.status}: {content[:500]!r}")
        return {"request to PNG": took_ms, **stages(answer.headers["Server-Timing"])}

    first = draw(0)
    drawn = [draw(number) for number in range(1, runs + 1)]
    medians = {name: statistics.median(one[name] for one in drawn) for name in first}
    times_ms = [one["request to PNG"] for one in drawn]
    spread = {"spread": max(times_ms) - min(times_ms), "first": first["request to PNG"]}
    return {"request to PNG": medians.pop("request to PNG"), **spread, **medians}


def stages(told: str) -> dict[str, float]:
    """Of a ``Server-Timing`` header, in ms."""
    parts = (part.split(";dur=") for part in told.split(", "))
    return {name: float(ms) for name, ms in parts}


if __name__ == "__main__":
    main()
