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
import json
import statistics
import time
from pathlib import Path
from typing import Any

from flags import assignment, count, seconds
from served import Service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x512", "1024x1024"])
    parser.add_argument("--runs", type=count, default=15, help="pictures of each size")
    parser.add_argument("--pause", type=seconds, default=0.0, help="seconds before each request")
    parser.add_argument("--data", type=Path, required=True, help="directory of the service")
    parser.add_argument(
        "--set", action="append", default=[], type=assignment, dest="settings", metavar="NAME=VALUE"
    )
    parser.add_argument("--wait", type=float, default=300.0, help="seconds until ready, at most")
    args = parser.parse_args()
    chosen = [f"warm_up_sizes={','.join(args.sizes)}", f"data_dir={args.data}", *args.settings]
    with Service(args.checkpoint, chosen, args.wait) as service:
        found: dict[str, Any] = {"ready_s": service.ready_s, "sizes": {}}
        print(f"ready after {found['ready_s']:.1f} s", flush=True)
        for size in args.sizes:
            found["sizes"][size] = ask(service, size, args.runs, args.pause)
            told = ", ".join(f"{name} {ms:.1f}" for name, ms in found["sizes"][size].items())
            print(f"{size}: {told} ms", flush=True)
    print(json.dumps(found))


def ask(service: Service, size: str, runs: int, pause_s: float) -> dict[str, float]:
    """Medians in ms: request to PNG as the client sees it, and what the service says of these."""

    def draw(number: int) -> dict[str, float]:
        prompt = f"picture {number} of a lighthouse, {size}"
        time.sleep(pause_s)
        answer = service.draw({"prompt": prompt, "size": size, "seed": number})
        return {"request to PNG": answer.took_ms, **answer.stages_ms}

    first = draw(0)
    drawn = [draw(number) for number in range(1, runs + 1)]
    medians = {name: statistics.median(one[name] for one in drawn) for name in first}
    times_ms = [one["request to PNG"] for one in drawn]
    spread = {"spread": max(times_ms) - min(times_ms), "first": first["request to PNG"]}
    return {"request to PNG": medians.pop("request to PNG"), **spread, **medians}


if __name__ == "__main__":
    main()
