"""Many clients at once, some of whom leave midway: does each of the others get its picture?

    python loadtest/clients.py http://127.0.0.1:7861 --clients 200 --leave 0.3

Each client asks for one picture of a random size. Of those who stay, one that is refused
comes back when it was told to, and has to be let in within twice that time. The run ends
by itself, after --limit seconds at the latest, and exits with 1 when anything was wrong.
It loads one machine, so it asks for a loopback address.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import ipaddress
import random
import re
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2
from PIL import Image

SIDES = (64, 96, 128, 192, 256)
STEPS = (1, 2, 4, 4, 8)
# HTTP's header counts whole seconds, so that nothing finer than this can be promised in it.
FINEST_S = 1.0


@dataclass
class Outcome:
    """What all clients together have seen. Times in seconds."""

    answered: int = 0
    left: int = 0
    refusals: int = 0
    wrong: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    overheads_s: list[float] = field(default_factory=list)
    # (told, took) of each client that was refused at first.
    waits_s: list[tuple[float, float]] = field(default_factory=list)

    @property
    def dishonest(self) -> list[tuple[float, float]]:
        """Waits that took more than twice what was told."""
        return [
            (told, took) for told, took in self.waits_s if took > max(2 * told, told + FINEST_S)
        ]


async def run(
    url: str, clients: int, leaving: float, *, seed: int = 0, limit_s: float = 300.0
) -> Outcome:
    """Let the clients loose; returns when all are done or the time is over."""
    chance, outcome = random.Random(seed), Outcome()
    unbounded = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=limit_s, limits=unbounded) as client:
        tasks = []
        for number in range(clients):
            body = {
                "prompt": f"picture {number}",
                "width": chance.choice(SIDES),
                "height": chance.choice(SIDES),
                "steps": chance.choice(STEPS),
                "seed": number,
            }
            patience_s = chance.uniform(0, 2) if chance.random() < leaving else None
            tasks.append(asyncio.create_task(_ask(client, body, patience_s, outcome)))
        _, unfinished = await asyncio.wait(tasks, timeout=limit_s)
        for task in unfinished:
            task.cancel()
        outcome.wrong += ["no answer in time"] * len(unfinished)
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcome


async def _ask(
    client: httpx2.AsyncClient, body: dict[str, object], patience_s: float | None, outcome: Outcome
) -> None:
    if patience_s is None:
        await _stay(client, body, outcome)
        return
    try:
        async with asyncio.timeout(patience_s):
            await client.post("/v1/generate", json=body)
    except TimeoutError:
        pass
    outcome.left += 1


async def _stay(client: httpx2.AsyncClient, body: dict[str, object], outcome: Outcome) -> None:
    refused_s = told_s = 0.0
    while True:
        asked_s = time.monotonic()
        answer = await client.post("/v1/generate", json=body)
        if answer.status_code != 429:
            break
        outcome.refusals += 1
        wait_s = float(answer.headers["retry-after-ms"]) / 1000
        if not told_s:
            # From when it is told: that it came late is no broken promise.
            refused_s, told_s = time.monotonic(), wait_s
        await asyncio.sleep(wait_s)
    took_s = time.monotonic() - asked_s
    if told_s:
        outcome.waits_s.append((told_s, asked_s - refused_s))
    if answer.status_code != 200:
        outcome.wrong.append(f"{answer.status_code}: {answer.text[:200]}")
        return
    made = answer.json()
    picture = Image.open(io.BytesIO(base64.b64decode(made["images"][0]["b64"])))
    if picture.size != (body["width"], body["height"]) or made["images"][0]["seed"] != body["seed"]:
        outcome.wrong.append(f"another picture than the one of {body}")
        return
    outcome.answered += 1
    outcome.latencies_s.append(took_s)
    outcome.overheads_s.append(took_s - made["timings"]["total_ms"] / 1000)


def _metric(text: str, pattern: str) -> float:
    found = re.search(rf"^{pattern} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def late_timers(before: str, after: str) -> str:
    """Timers of the event loop that came more than 50 and 100 ms late in the run."""

    def more(metric: str) -> float:
        pattern = f"fluxd_event_loop_lag_seconds_{metric}"
        return _metric(after, pattern) - _metric(before, pattern)

    count = more("count")
    late = [count - more(rf'bucket\{{le="{bound}"\}}') for bound in (0.05, 0.1)]
    return f"{late[0]:.0f} timers of {count:.0f} over 50 ms late, {late[1]:.0f} over 100 ms"


def _quantiles(values: list[float]) -> str:
    if not values:
        return "none"
    ordered = sorted(values)
    shown = [ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.9, 0.99)]
    return "p50 {:.3f}  p90 {:.3f}  p99 {:.3f}".format(*shown)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--leave", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0)
    given = parser.parse_args()
    if not ipaddress.ip_address(urlsplit(given.url).hostname or "").is_loopback:
        parser.error("the address must be a loopback one, such as http://127.0.0.1:7861")
    before = httpx2.get(f"{given.url}/metrics").text
    began_s = time.monotonic()
    outcome = asyncio.run(
        run(given.url, given.clients, given.leave, seed=given.seed, limit_s=given.limit)
    )
    spent_s = time.monotonic() - began_s
    after = httpx2.get(f"{given.url}/metrics").text
    memory = [_metric(text, "process_resident_memory_bytes") / 2**20 for text in (before, after)]
    for name, shown in (
        ("clients", f"{outcome.answered} answered, {outcome.left} left, in {spent_s:.1f} s"),
        ("refusals", f"{outcome.refusals}, of {len(outcome.waits_s)} clients"),
        ("waits over twice the told", f"{len(outcome.dishonest)} {outcome.dishonest[:5]}"),
        ("answer, s", _quantiles(outcome.latencies_s)),
        ("beside the job, s", _quantiles(outcome.overheads_s)),
        ("event loop", late_timers(before, after)),
        ("resident, MiB", f"{memory[0]:.0f} -> {memory[1]:.0f}"),
        ("wrong", f"{len(outcome.wrong)} {outcome.wrong[:5]}"),
    ):
        print(f"{name:<26}{shown}")
    return 1 if outcome.wrong or len(outcome.dishonest) > 0.05 * len(outcome.waits_s) else 0


if __name__ == "__main__":
    sys.exit(main())
