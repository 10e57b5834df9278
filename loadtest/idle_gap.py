"""How long the device stands idle between back-to-back jobs.

    python loadtest/idle_gap.py [--model DIR] [--jobs 30] [--size 256] [--steps 4] [--clients 4]
        [--cached]

A real service on a free port is kept busy by clients who send their next request as soon
as they have an answer, so that a job always waits. Measured on the worker's own thread: a
slice is the device's time, and what lies between the end of one slice and the start of the
next is the gap. Slices of the first and last jobs are left out.

A GPU has the next work queued while the host looks at the last, so it is asked itself, too: by
events in its queue before and behind each text, step and decoding. The gaps between these hold
small work like noise; what launching takes counts as work.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from app.engine import LoadStep
from app.main import create_engine, create_server, listen, pipeline_loader
from app.settings import Settings

WARM_JOBS = 3
Slice = tuple[float, float, int]


class Watched:
    """A pipeline that notes when each of its slices begins and ends, and of which job."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.queue = Queue(pipeline) if pipeline.runtime.kind == "cuda" else None
        self.slices: list[Slice] = []
        self._jobs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def share(self, run: Any, count: int) -> float:
        """Each job's slices are to be its own."""
        return 1.0

    def run(self, params: Any, *, alone: bool = False) -> WatchedRun:
        self._jobs += 1
        return WatchedRun(self._pipeline.run(params, alone=alone), self._jobs, self.slices)


class WatchedRun(Iterator[Any]):
    """One job's slices, noted."""

    def __init__(self, run: Any, job: int, slices: list[Slice]) -> None:
        self._run, self._job, self._slices = run, job, slices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def __next__(self) -> Any:
        began = time.perf_counter()
        try:
            return next(self._run)
        finally:
            self._slices.append((began, time.perf_counter(), self._job))


class Queue:
    """What a GPU has to do, in its order: events before and behind each part of a job."""

    def __init__(self, pipeline: Any) -> None:
        self.parts: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for part in ("_embeddings_of", "_velocity_of", "begin_decode"):
            setattr(pipeline, part, self._noted(part, getattr(pipeline, part)))

    def _noted(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            began.record()
            done = work(*args)
            ended.record()
            self.parts.append((part, began, ended))
            return done

        return noted

    def report(self) -> None:
        """Each job ends with its decoding."""
        ends = [i for i, (part, _, _) in enumerate(self.parts) if part == "begin_decode"]
        kept = self.parts[ends[WARM_JOBS - 1] : ends[-WARM_JOBS - 1] + 1]
        gaps = [
            (ended.elapsed_time(began), part == "begin_decode")
            for (part, _, ended), (_, began, _) in itertools.pairwise(kept)
        ]
        tell("the GPU", gaps, kept[0][2].elapsed_time(kept[-1][2]), len(ends) - 2 * WARM_JOBS)


def keep_busy(url: str, jobs: int, clients: int, body: dict[str, Any]) -> None:
    """Send ``jobs`` requests from ``clients`` threads, each as soon as its last is answered."""
    numbers, lock = iter(range(jobs)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            data = json.dumps({"prompt": f"a red circle, {number}", "seed": number, **body})
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
    parser.add_argument("--cached", action="store_true", help="one prompt for all jobs")
    args = parser.parse_args()
    if args.jobs <= 2 * WARM_JOBS:
        parser.error(f"--jobs must be more than {2 * WARM_JOBS}; the first and last are left out")
    settings = Settings(
        model=args.model,
        device=args.device,
        port=0,
        data_dir="off",
        warm_up_sizes=f"{args.size}x{args.size}",
    )
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
    while not (engine.status().is_ready or engine.has_failed):
        time.sleep(0.05)
    if engine.has_failed:
        server.should_exit = True
        thread.join()
        sys.exit("the model could not be loaded; the lines above tell why")
    watched[0].slices.clear()
    if watched[0].queue is not None:
        watched[0].queue.parts.clear()
    body: dict[str, Any] = {"width": args.size, "height": args.size, "steps": args.steps}
    if args.cached:
        body["prompt"] = "a red circle"
    keep_busy(url, args.jobs, args.clients, body)
    server.should_exit = True
    thread.join()
    report(watched[0].slices, args)
    if watched[0].queue is not None:
        watched[0].queue.report()


def report(slices: list[Slice], args: argparse.Namespace) -> None:
    kept = set(sorted({job for _, _, job in slices})[WARM_JOBS:-WARM_JOBS])
    kept_slices = [each for each in slices if each[2] in kept]
    gaps = [
        (1000 * (after[0] - before[1]), before[2] != after[2])
        for before, after in itertools.pairwise(kept_slices)
    ]
    print(
        f"{len(kept)} jobs of {args.size}x{args.size}, {args.steps} steps, {args.clients} clients"
    )
    tell("the worker", gaps, 1000 * (kept_slices[-1][1] - kept_slices[0][0]), len(kept))


def tell(who: str, gaps: Sequence[tuple[float, bool]], whole_ms: float, jobs: int) -> None:
    """Gaps in milliseconds, and whether each lies between two jobs."""
    idle_ms = sum(gap for gap, _ in gaps)
    print(f"{who}: one job takes {whole_ms / jobs:.1f} ms, idle {idle_ms / jobs:.2f}")
    for name, is_between in (("within a job", False), ("between jobs", True)):
        found = [gap for gap, between in gaps if between == is_between]
        if len(found) > 1:
            tenths = statistics.quantiles(found, n=10, method="inclusive")
            print(
                f"  gaps {name}: median {statistics.median(found):.3f} ms, "
                f"p90 {tenths[-1]:.3f}, most {max(found):.3f}, "
                f"n {len(found)}, share {sum(found) / whole_ms:.2%}"
            )
    print(f"  idle share {idle_ms / whole_ms:.2%}")


if __name__ == "__main__":
    main()
