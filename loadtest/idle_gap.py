"""How long the device stands idle between back-to-back jobs.

    python loadtest/idle_gap.py [--model DIR] [--jobs 30] [--size 256] [--steps 4] [--clients 4]

A real service on a free port is kept busy by clients who send their next request as soon
as they have an answer, so that a job always waits. Measured on the worker's own thread: a
slice is the device's time, and what lies between the end of one slice and the start of the
next is the gap. Slices of the first and last jobs are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from app.engine import LoadStep
from app.main import create_engine, create_server, listen, pipeline_loader
from app.settings import Settings

WARM_JOBS = 3


class Watched:
    """A pipeline that notes when each of its slices begins and ends, and of which job."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.slices: list[tuple[float, float, int, str]] = []
        self._jobs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def share(self, run: Any, count: int) -> float:
        """Each job's slices are to be its own."""
        return 1.0

    def run(self, params: Any, *, alone: bool = False) -> Generator[Any, None, Any]:
        self._jobs += 1
        job, work = self._jobs, self._pipeline.run(params, alone=alone)
        while True:
            began = time.perf_counter()
            try:
                done = next(work)
            except StopIteration as end:
                self.slices.append((began, time.perf_counter(), job, "end"))
                return end.value
            self.slices.append((began, time.perf_counter(), job, done.stage))
            yield done


def keep_busy(url: str, jobs: int, clients: int, body: dict[str, Any]) -> None:
    """Send ``jobs`` requests from ``clients`` threads, each as soon as its last is answered."""
    numbers = iter(range(jobs))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            data = json.dumps({**body, "prompt": f"a red circle, {number}", "seed": number})
            request = urllib.request.Request(
                f"{url}/v1/generate",
                data.encode(),
                {"Content-Type": "application/json", "Accept": "image/png"},
            )
            with urllib.request.urlopen(request, timeout=600) as answer:
                answer.read()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    settings = Settings(model=args.model, device=args.device, port=0, data_dir="off")
    load = pipeline_loader(settings.model, settings)
    watched: list[Watched] = []

    def load_watched(progress: Callable[[LoadStep], None]) -> Any:
        watched.append(Watched(load(progress)))
        return watched[0]

    engine = create_engine(settings, load_watched)
    listener = listen(settings.host, 0)
    server = create_server(settings, engine)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    while not engine.status().is_ready:
        time.sleep(0.05)
    watched[0].slices.clear()
    body = {"width": args.size, "height": args.size, "steps": args.steps}
    keep_busy(url, args.jobs, args.clients, body)
    server.should_exit = True
    thread.join()
    report(watched[0].slices, args)


def report(slices: list[tuple[float, float, int, str]], args: argparse.Namespace) -> None:
    order = sorted({job for _, _, job, _ in slices})
    kept = {job for job in order if WARM_JOBS < order.index(job) + 1 <= len(order) - WARM_JOBS}
    kept_slices = [each for each in slices if each[2] in kept]
    gaps = [
        (after[0] - before[1], before[2] != after[2])
        for before, after in itertools.pairwise(kept_slices)
    ]
    whole = kept_slices[-1][1] - kept_slices[0][0]
    idle = sum(gap for gap, _ in gaps)
    job_ms = 1000 * whole / len(kept)
    print(
        f"{len(kept)} jobs of {args.size}x{args.size}, {args.steps} steps, {args.clients} clients"
    )
    print(
        f"one job takes {job_ms:.1f} ms, of which the device is idle {1000 * idle / len(kept):.2f}"
    )
    for name, is_between in (("within a job", False), ("between jobs", True)):
        found = [1000 * gap for gap, between in gaps if between == is_between]
        if len(found) > 1:
            print(
                f"  gaps {name}: median {statistics.median(found):.3f} ms, "
                f"p90 {statistics.quantiles(found, n=10)[-1]:.3f}, most {max(found):.3f}, "
                f"n {len(found)}"
            )
    print(f"idle share {idle / whole:.2%}")


if __name__ == "__main__":
    main()
