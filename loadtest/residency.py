"""What each residency takes and costs: peak memory, start, text, steps; is the picture the same?

    python loadtest/residency.py [DIR] [--device auto] [--size 512] [--runs 3] [--limit-gb 8 16 24]

Without DIR a random checkpoint is written that has a quarter of the 4B's weights, half as
wide in every part (4 GB of disk for as long as it runs). Every way runs in a process of
its own. With --limit-gb a CUDA device is given only so much
of its memory, and `auto` chooses; that needs no smaller card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.runtime import WAYS, Runtime, host_peak_bytes
from fluxcore.weights.random_checkpoint import PRESETS, write_random_checkpoint

MB = 10**6

QUARTER = replace(
    PRESETS["4b"],
    transformer=replace(PRESETS["4b"].transformer, num_attention_heads=12),
    text_encoder=replace(
        PRESETS["4b"].text_encoder,
        hidden_size=1280,
        intermediate_size=4864,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """One way, in this process."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.limit_gb:
        (limit,) = args.limit_gb
        torch.cuda.set_per_process_memory_fraction(
            limit * 1e9 / torch.cuda.get_device_properties(0).total_memory
        )
        Runtime.available_bytes = lambda self: int(limit * 1e9)  # type: ignore[method-assign]
    before = host_peak_bytes()
    began = time.perf_counter()
    pipe = FluxPipeline.load(args.directory, device=args.device, residency=args.way)
    loaded_s = time.perf_counter() - began
    pipe.warm_up(sizes=((args.size, args.size),))
    pipe.runtime.reset_peak()
    results = [
        pipe.generate(
            GenerationParams(prompt=f"fox {i}", width=args.size, height=args.size, seed=i)
        )
        for i in range(args.runs)
    ]
    pictures = hashlib.sha256(b"".join(result.images[0].tobytes() for result in results))
    middle = {
        stage: round(statistics.median(result.timings[stage] for result in results))
        for stage in ("text", "denoise", "decode", "total")
    }
    return {
        "asked": args.way,
        "way": pipe.runtime.residency,
        "limit_gb": args.limit_gb[0] if args.limit_gb else None,
        "load_s": round(loaded_s, 1),
        "weights_mb": pipe.info.weight_bytes // MB,
        "device_peak_mb": pipe.runtime.peak_bytes() // MB,
        "host_peak_mb": (host_peak_bytes() - before) // MB,
        **middle,
        "pictures": pictures.hexdigest()[:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit-gb", type=float, nargs="*", default=[])
    parser.add_argument("--way", choices=("auto", *WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as place:
        directory = args.directory or str(
            write_random_checkpoint(Path(place) / "quarter", architecture=QUARTER)
        )
        compare(directory, args)


def compare(directory: str, args: argparse.Namespace) -> None:
    """All ways, one process after the other."""
    plain = [directory, "--device", args.device, "--size", str(args.size), "--runs"]
    plain.append(str(args.runs))
    runs = [["--way", way] for way in WAYS]
    runs += [["--way", "auto", "--limit-gb", str(limit)] for limit in args.limit_gb]
    rows = []
    for extra in runs:
        done = subprocess.run(
            [sys.executable, __file__, *plain, *extra],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if len(rows) == 1:
            print("  ".join(f"{name:>14}" for name in rows[0]))
        print("  ".join(f"{value!s:>14}" for value in rows[-1].values()), flush=True)
    same = len({row["pictures"] for row in rows}) == 1
    print("the same pictures" if same else "THE PICTURES DIFFER")


if __name__ == "__main__":
    main()
