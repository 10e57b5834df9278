"""What steps of several pictures as one gain, and whether the pictures stay the same.

    python loadtest/batching.py [--model DIR] [--sizes 256 512] [--jobs 24] [--rounds 3]

The engine as the service runs it, without HTTP, once for each setting of ``batching``, all on
one set of weights and in turns. It is given so many jobs at once, each of one picture, and then
one job of four pictures. Shown are pictures per second, how long a job waits for its picture,
what a job of four takes, the share of steps that were joined, and which pictures differ from
those of "off". The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

from flags import as_settings, assignment, count, side_px

from app.engine import Engine, Job, JobOutcome, Limits, Packing
from app.main import pipeline_loader
from app.settings import Settings
from fluxcore import FluxPipeline, GenerationParams
from fluxcore.pipeline.joint_steps import Batching, JointSteps

WAYS: tuple[Batching, ...] = ("off", "exact", "fast")
LONGEST_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--set", action="append", default=[], type=assignment, dest="settings", metavar="NAME=VALUE"
    )
    parser.add_argument("--sizes", type=side_px, nargs="+", default=[256])
    parser.add_argument("--steps", type=count, default=4)
    parser.add_argument("--jobs", type=count, default=24)
    parser.add_argument("--rounds", type=count, default=3)
    args = parser.parse_args()
    given: dict[str, Any] = {**as_settings(args.settings)}
    settings = Settings(model=args.model, device=args.device, data_dir="off", **given)
    pipe: Any = pipeline_loader(settings.model, settings)(lambda step: None)
    engines = {way: _engine(pipe, way) for way in WAYS}
    report = {}
    for side in args.sizes:
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds + 1):  # the first one makes trials and recordings
            for way, engine in engines.items():
                found[way].append(_round(engine, side, args))
        report[str(side)] = _told(side, {way: rounds[1:] for way, rounds in found.items()})
    for engine in engines.values():
        engine.stop()
    print(json.dumps(report))


def _engine(pipe: FluxPipeline, way: Batching) -> Engine:
    """An engine on the one pipeline; only one of them ever has jobs."""
    own = copy.copy(pipe)  # the same weights, with trials of its own
    own.joint = JointSteps(lambda *args: pipe._velocity_of(*args), pipe.runtime, way)
    limits = Limits(jobs=1000, work_s=1e9)
    engine = Engine(lambda progress: own, limits=limits, joins=way != "off")
    engine.start()
    while not engine.status().is_ready:
        time.sleep(0.01)
    return engine


def _round(engine: Engine, side: int, args: argparse.Namespace) -> dict[str, Any]:
    def submit(seed: int, n: int = 1) -> Job:
        params = GenerationParams(
            prompt="a red circle", width=side, height=side, steps=args.steps, seed=seed, n=n
        )
        return engine.submit(params, Packing("png"), f"seed-{seed}")

    steps = engine.metrics.registry.get_sample_value
    joint, began_s = steps("fluxd_joint_steps_total") or 0.0, time.monotonic()
    ends: list[float] = []
    jobs = [submit(seed) for seed in range(args.jobs)]
    for job in jobs:
        job.future.add_done_callback(lambda _: ends.append(time.monotonic() - began_s))
    outcomes = [job.future.result(LONGEST_S) for job in jobs]
    took_s = time.monotonic() - began_s
    joined = ((steps("fluxd_joint_steps_total") or 0.0) - joint) / (args.jobs * args.steps)
    began_s = time.monotonic()
    four = submit(0, 4).future.result(LONGEST_S)
    return {
        "pictures_per_s": args.jobs / took_s,
        "mean_wait_s": statistics.mean(ends),
        "four_pictures_s": time.monotonic() - began_s,
        "joined": joined,
        "pictures": [_digest(outcome) for outcome in (*outcomes, four)],
    }


def _digest(outcome: JobOutcome) -> list[str]:
    """Of the bytes of each picture, its text chunks with them: these tell the seed alone."""
    return [hashlib.sha256(picture.data).hexdigest() for picture in outcome.pictures]


def _told(side: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    print(f"\n{side}x{side}: {'':16}" + "".join(f"{way:>12}" for way in found))
    told: dict[str, Any] = {}
    for name in ("pictures_per_s", "mean_wait_s", "four_pictures_s", "joined"):
        told[name] = {
            way: statistics.median(each[name] for each in rounds) for way, rounds in found.items()
        }
        print(f"{name:24}" + "".join(f"{told[name][way]:12.4g}" for way in found))
    first = found["off"][0]["pictures"]
    told["pictures_that_differ"] = {
        way: max(
            sum(a != b for a, b in zip(first, each["pictures"], strict=True)) for each in rounds
        )
        for way, rounds in found.items()
    }
    print(
        f"{'pictures that differ':24}"
        + "".join(f"{n:12}" for n in told["pictures_that_differ"].values())
    )
    return told


if __name__ == "__main__":
    main()
