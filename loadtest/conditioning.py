"""What a text embedding costs: made by the encoder, found on disk, found in memory.

    python loadtest/conditioning.py [DIR] [--runs 15]

DIR is a checkpoint; without it the bundled model is measured. The files on disk are read
from the page cache, as they are right after a restart of the service.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fluxcore import FluxPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        pipe = FluxPipeline.load(
            arguments.directory,
            conditioning_store=Path(store),
            conditioning_store_bytes=2**32,
        )
        cache, kept = pipe.conditioning_cache, pipe.conditioning_store
        assert kept is not None, "a store was asked for"
        spent: dict[str, list[float]] = {"encoder": [], "disk": [], "memory": []}
        pipe.encode_prompt("warm up")
        for run in range(arguments.runs):
            for how in spent:
                if how == "disk":
                    kept.wait()
                    cache.forget_memory()
                began = time.perf_counter()
                pipe.encode_prompt(f"a red fox, number {run}")
                pipe.runtime.synchronize()
                spent[how].append((time.perf_counter() - began) * 1000)
        size = next(Path(store).iterdir()).stat().st_size
    assert kept.hits == arguments.runs, "every second time it came from the disk"
    print(f"{pipe.info.name}, {pipe.runtime.describe()}")
    print(f"torch {torch.__version__}, {arguments.runs} prompts, {size} bytes a file")
    for how, times in spent.items():
        quartiles = statistics.quantiles(times, n=4)
        print(f"{how:8} {quartiles[1]:8.2f} ms  ({quartiles[0]:.2f} to {quartiles[2]:.2f})")


if __name__ == "__main__":
    main()
