"""What a GPU keeps up: pictures, and the products that they are made of, rested and without rest.

    python loadtest/sustained.py CHECKPOINT --sizes 256 512 1024 [--set precision=fp8]

At its limit of power a GPU lowers its clock, so that what it does once it does not keep up. A
picture is drawn from text to pixels, and then as a floor no more than its matrix products,
attention and convolutions, as the plain form has them and each in the fastest form that ``fluxd
bench`` finds, as one recording. Each is timed after a rest, and then again and again for some
seconds, of which the last half counts. Clock and power are nvidia-smi's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flags import as_settings, assignment, count, seconds, side_px

from app.main import pipeline_loader
from app.settings import Settings
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.bench.operations import Work, stage_work
from fluxcore.bench.rates import Rates

REST_S = 0.5
RESTED_RUNS = 5
ASKED = "clocks.sm,power.draw.instant"
AS_NUMBERS = ("--format=csv,noheader,nounits", "-lms", "20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", type=side_px, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--steps", type=count, default=4)
    parser.add_argument("--seconds", type=seconds, default=4.0, help="without rest")
    parser.add_argument(
        "--set", action="append", default=[], type=assignment, dest="settings", metavar="NAME=VALUE"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU, and a PyTorch that can use it")
    given: dict[str, Any] = {**as_settings(args.settings)}
    settings = Settings(model=args.checkpoint, device="cuda", data_dir="off", **given)
    pipe: Any = pipeline_loader(settings.model, settings)(lambda step: None)
    found: dict[str, dict[str, Any]] = {}
    for side in args.sizes:
        works = {"picture": picture(pipe, side, args.steps), "floor": floor(pipe, side, args.steps)}
        for name, work in works.items():
            found[f"{name}, {side}x{side}"] = told = timed(work, args.seconds)
            values = ", ".join(f"{what} {value:.1f}" for what, value in told.items())
            print(f"{side}x{side} {name}: {values}", flush=True)
    print(json.dumps(found))


def picture(pipe: FluxPipeline, side: int, steps: int) -> Callable[[], object]:
    """Draws one, its prompt not cached."""

    def draw() -> None:
        pipe.conditioning_cache.clear()
        pipe.generate(
            GenerationParams(prompt="a lighthouse", width=side, height=side, steps=steps, seed=42)
        )

    return draw


@torch.inference_mode()
def floor(pipe: FluxPipeline, side: int, steps: int) -> Callable[[], object]:
    """Does a picture's products, attention and convolutions, one kind after the other."""
    stages = stage_work(pipe.config, side, side, steps)
    whole: Work = stages["text"] + stages["text tokens"] + stages["vae"]
    for _ in range(steps):
        whole += stages["step"]
    rates = Rates(pipe.runtime)
    calls = [(rates.fastest(part), count) for part, count in whole.items()]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call, _ in calls:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call, count in calls:
            for _ in range(count):
                call()

    # A recording works on the tensors of its calls, which go with these.
    return partial(replay, graph, calls)


def replay(graph: torch.cuda.CUDAGraph, _calls: object) -> None:
    graph.replay()
    torch.cuda.synchronize()


def timed(work: Callable[[], object], seconds: float) -> dict[str, float]:
    """Medians in ms, with clock and power while there was no rest, if they are known."""
    for _ in range(3):
        work()
    rested = []
    for _ in range(RESTED_RUNS):
        time.sleep(REST_S)
        rested.append(once_ms(work))
    times: list[float] = []
    with watched() as samples:
        begun_s = time.monotonic()
        while time.monotonic() < begun_s + seconds:
            times.append(once_ms(work))
    told = {
        "rested_ms": statistics.median(rested),
        "without_rest_ms": statistics.median(times[len(times) // 2 :]),
    }
    late = samples[len(samples) // 2 :]
    if late:
        told["clock_mhz"], told["power_w"] = map(statistics.mean, zip(*late, strict=True))
    return told


def once_ms(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return (time.perf_counter() - begun_s) * 1000


@contextmanager
def watched() -> Iterator[list[tuple[float, float]]]:
    """Clock in MHz and power in W, as nvidia-smi tells them meanwhile; empty where it is not."""
    of = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", "-i", of, f"--query-gpu={ASKED}", *AS_NUMBERS]
    samples: list[tuple[float, float]] = []
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield samples
        return

    def read() -> None:
        assert asked.stdout is not None, "asked for above"
        for line in asked.stdout:
            with suppress(ValueError):  # what a driver does not know
                clock, power = map(float, line.split(","))
                samples.append((clock, power))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield samples
    finally:
        asked.terminate()
        asked.wait(10)
        reader.join()


if __name__ == "__main__":
    main()
