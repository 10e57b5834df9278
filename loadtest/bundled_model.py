"""Seconds per picture of the bundled model, warm, and where they go, stage by stage.

    python loadtest/bundled_model.py --runs 9 --sizes 256 512 --dtypes bfloat16 float32

The text encoder is in every run: the cache of conditionings is emptied. Beside the wall
time stand the processor's seconds, which other work on the machine does not lengthen so
much, and the floor: the operations that PyTorch counts over the rate of one large matrix
product in the same dtype. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fluxcore import FluxPipeline, GenerationParams

STAGES = ("text", "denoise", "decode")
PROMPT = "a large red circle to the left of a small blue star on a white background"
PRODUCT_SIDE = 2048
GOAL_S = 2.0
"""Of a picture of 256x256 on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="another checkpoint than the bundled one")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=9, help="counted runs after one warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["auto"])
    args = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f} at the start")
    reports = [measure(args, dtype) for dtype in args.dtypes]
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    print(json.dumps(reports))


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Load the model in one dtype and time all sizes."""
    begun = time.perf_counter()
    pipe = FluxPipeline.load(args.model, device=args.device, dtype=dtype)
    loaded = time.perf_counter()
    pipe.warm_up()
    report: dict[str, Any] = {
        "model": pipe.info.name,
        "runtime": pipe.runtime.describe(),
        "load_s": loaded - begun,
        "warm_up_s": time.perf_counter() - loaded,
        "product_tflops": product_rate(pipe) / 1e12,
        "sizes": {},
    }
    print(
        f"\n{report['model']}, {pipe.runtime.dtypes.name}: load {report['load_s']:.2f} s, warm-up "
        f"{report['warm_up_s']:.2f} s, {report['product_tflops']:.2f} TFLOP/s in one product"
    )
    for size in args.sizes:
        report["sizes"][size] = time_size(pipe, size, args)
        show(size, report["sizes"][size], report["product_tflops"])
    report["peak_bytes"] = pipe.runtime.peak_bytes()
    return report


def time_size(pipe: FluxPipeline, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Draw one picture to warm up, one to count operations, then the timed ones."""

    def params(run: int) -> GenerationParams:
        return GenerationParams(prompt=PROMPT, width=size, height=size, steps=args.steps, seed=run)

    pipe.generate(params(0))
    operations = count_operations(pipe, params(1))
    runs = []
    for run in range(2, args.runs + 2):
        pipe.conditioning_cache.clear()
        processor = time.process_time()
        result = pipe.generate(params(run))
        drawn = time.perf_counter()
        result.images[0].save(io.BytesIO(), "PNG")
        times = {**result.timings, "pack": (time.perf_counter() - drawn) * 1000}
        times["total"] += times["pack"]
        times["processor"] = (time.process_time() - processor) * 1000
        runs.append(times)
    return {
        "operations": operations,
        "median_ms": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "least_ms": {name: min(run[name] for run in runs) for name in runs[0]},
        "spread_ms": max(r["total"] for r in runs) - min(r["total"] for r in runs),
        "runs": len(runs),
    }


def count_operations(pipe: FluxPipeline, params: GenerationParams) -> dict[str, int]:
    """Floating-point operations of each stage, as PyTorch counts them."""
    job = pipe.prepare(params)
    counts = {}
    pipe.conditioning_cache.clear()
    with FlopCounterMode(display=False) as counter:
        pipe.encode_text(job)
    counts["text"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        steps = list(pipe.denoise(job))
    counts["denoise"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        pipe.decode(steps[-1].latents, job.params.width, job.params.height)
    counts["decode"] = counter.get_total_flops()
    return counts


def product_rate(pipe: FluxPipeline) -> float:
    """Operations per second of a large square matrix product: what the machine could do."""
    shape = (PRODUCT_SIDE, PRODUCT_SIDE)
    a, b = (
        torch.randn(shape, device=pipe.runtime.device).to(pipe.runtime.dtypes.weights)
        for _ in range(2)
    )
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        torch.mm(a, b)
        pipe.runtime.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * PRODUCT_SIDE**3 / best


def show(size: int, found: dict[str, Any], tflops: float) -> None:
    """One table."""
    print(f"{size}x{size}, {found['runs']} runs    median      least   GFLOP   floor")
    for name, median in found["median_ms"].items():
        line = f"  {name:12} {median:12.1f} ms {found['least_ms'][name]:8.1f} ms"
        if name in STAGES:
            operations = found["operations"][name]
            line += f" {operations / 1e9:7.1f} {operations / tflops / 1e9:5.0f} ms"
        print(line)
    verdict = f"  spread of the total {found['spread_ms']:.0f} ms"
    if size == 256:
        met = found["median_ms"]["total"] < GOAL_S * 1000
        verdict += f"; goal of {GOAL_S:g} s {'met' if met else 'MISSED'}"
    print(verdict)


if __name__ == "__main__":
    main()
