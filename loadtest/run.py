"""A service under load, mode by mode, as a report for people: HTML, PNG and JSON.

    python loadtest/run.py http://127.0.0.1:7861 --seconds 30 --output report

Modes: SingleStream, Server (several rates of Poisson arrivals), Offline, Mixed sizes, and
clients that leave. Each runs Locust with users of loadtest/locustfile.py for so many
seconds; beside what they see stands what the service's own metrics say of the same time.
Every mode ends by itself. It loads one machine, so it asks for a loopback address.
loadtest/README.md says how to read the report. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
MODES = ("SingleStream", "Server", "Offline", "Mixed", "Leaving")
SHARES = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2)
"""Rates of Server, as shares of what Offline draws."""
BOUND_FACTOR = 4.0
"""Server's bound on p99, where none is given, in medians of SingleStream."""
KEPT_SHARE = 0.99
"""Of a rate's requests, so many are to be answered within the bound."""
SPARE_S = 120
"""How long the last answers of a mode may take; then it is ended."""
COUNTERS = {
    "pictures": r"fluxd_images_total",
    "device_busy_s": r"fluxd_device_busy_seconds_total",
    "waits": r"fluxd_queue_wait_seconds_count",
    "waited_s": r"fluxd_queue_wait_seconds_sum",
    "left": r"fluxd_client_disconnects_total",
    "refused": r"fluxd_rejections_total\{[^}]*\}",
    "processor_s": r"process_cpu_seconds_total",
    "loop_lags": r"fluxd_event_loop_lag_seconds_count",
    "loop_on_time": r'fluxd_event_loop_lag_seconds_bucket\{le="0.05"\}',
}


@dataclass
class Seen:
    """One mode, from both sides. Units: seconds, requests.

    Attributes:
        rate: arrivals a second that were asked for; Server only.
        latencies_s: of answered requests, sorted.
        waits_s: of the same, how long they stood in the queue, as their answers say.
        server: how much each of ``COUNTERS`` grew, and ``memory_mib`` at the end.
    """

    mode: str
    users: int
    rate: float | None
    spent_s: float
    outcomes: dict[str, int]
    latencies_s: list[float] = field(repr=False)
    waits_s: list[float] = field(repr=False)
    server: dict[str, float]

    @property
    def throughput(self) -> float:
        """Answered requests a second."""
        return self.outcomes.get("answered", 0) / self.spent_s

    @property
    def wrong(self) -> int:
        return self.outcomes.get("wrong", 0) + self.outcomes.get("failed", 0)

    def latency_s(self, quantile: float) -> float | None:
        return quantile_of(self.latencies_s, quantile)

    def wait_s(self, quantile: float) -> float | None:
        return quantile_of(self.waits_s, quantile)

    @property
    def device_s(self) -> float | None:
        """Device time a picture."""
        pictures = self.server["pictures"]
        return self.server["device_busy_s"] / pictures if pictures else None

    def meets(self, bound_s: float) -> bool:
        """Whether 99 of 100 that asked were answered, right and in time, and none refused."""
        asked = sum(self.outcomes.values())
        in_time = sum(latency_s <= bound_s for latency_s in self.latencies_s)
        is_kept = in_time > 0 and in_time >= KEPT_SHARE * asked
        return is_kept and not self.outcomes.get("refused")


def main() -> int:
    from flags import count, side_px

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seconds", type=count, default=30, help="of each mode and rate")
    parser.add_argument("--side", type=side_px, default=256)
    parser.add_argument("--steps", type=count, default=4)
    parser.add_argument("--users", type=count, default=8, help="of Offline, Mixed and Leaving")
    parser.add_argument("--rates", type=float, nargs="+", help="of Server; default: by Offline")
    parser.add_argument("--bound", type=float, help="seconds; Server's p99 has to keep it")
    parser.add_argument("--output", type=Path, default=Path("load-report"))
    args = parser.parse_args()
    if not is_loopback(args.url):
        parser.error("the address must be a loopback one, such as http://127.0.0.1:7861")
    missing = [name for name in ("locust", "matplotlib") if find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} not installed; run: pip install -e '.[load]'")
    try:
        scrape(args.url)
    except urllib.error.HTTPError as error:
        parser.error(f"{args.url}/metrics answers {error}; it must be open to those without a key")
    except OSError as error:
        parser.error(f"nothing answers at {args.url}/metrics ({error}); start fluxd serve first")
    begun_s = time.monotonic()
    results = run_all(args)
    bound_s = args.bound or _usual_bound_s(results)
    summary = summarise(results, bound_s)

    from report import write_report

    args.output.mkdir(parents=True, exist_ok=True)
    title = f"{args.url}, {args.side}x{args.side}, {args.steps} steps, {args.seconds:g} s a mode"
    write_report(args.output, title, results, summary, bound_s)
    whole = {"summary": summary, "modes": [asdict(seen) for seen in results]}
    (args.output / "report.json").write_text(json.dumps(whole), encoding="utf-8")
    print(f"{args.output / 'report.html'}, after {time.monotonic() - begun_s:.0f} s")
    print(json.dumps(summary))
    return 1 if summary["wrong"] else 0


def run_all(args: argparse.Namespace) -> list[Seen]:
    """All modes in order; Server comes after Offline, by which its rates are chosen."""
    results: list[Seen] = []
    order = sorted(args.modes, key=("SingleStream", "Offline", "Server", "Mixed", "Leaving").index)
    for mode in order:
        users = 1 if mode in ("SingleStream", "Server") else args.users
        rates: Sequence[float | None] = [None]
        if mode == "Server":
            rates = args.rates or [share * _saturation(results) for share in SHARES]
        for rate in rates:
            seen = run_mode(args, mode, users, rate)
            results.append(seen)
            at = f" at {rate:.3g}/s" if rate else ""
            p99 = seen.latency_s(0.99)
            shown = "none answered" if p99 is None else f"p99 {p99:.3f} s"
            print(f"{mode}{at}: {seen.outcomes}, {seen.throughput:.3g}/s, {shown}", flush=True)
    return results


def run_mode(args: argparse.Namespace, mode: str, users: int, rate: float | None) -> Seen:
    """One mode by Locust, in a process of its own, which is ended if it does not end."""
    with tempfile.TemporaryDirectory() as place:
        record = Path(place) / "requests.jsonl"
        command = [
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), mode),
            *("--headless", "--only-summary", "--skip-log-setup", "--host", args.url),
            *("--users", str(users), "--spawn-rate", str(users)),
            *("--run-time", f"{args.seconds}s", "--stop-timeout", f"{SPARE_S}s"),
            *("--side", str(args.side), "--steps", str(args.steps), "--record", str(record)),
            *(("--rate", str(rate)) if rate else ()),
            *("--exit-code-on-error", "0"),
        ]
        before = scrape(args.url)
        ended = subprocess.run(
            command, timeout=args.seconds + 2 * SPARE_S, capture_output=True, text=True, check=False
        )
        if ended.returncode or not record.exists():
            raise SystemExit(f"{mode}: Locust failed\n{ended.stderr[-2000:]}")
        after = scrape(args.url)
        lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    answered = [line for line in lines if line["outcome"] == "answered"]
    outcomes: dict[str, int] = {}
    for line in lines:
        outcomes[line["outcome"]] = outcomes.get(line["outcome"], 0) + 1
    begun_s = min((line["began_s"] for line in lines), default=0.0)
    ended_s = max((line["began_s"] + line["took_s"] for line in lines), default=1.0)
    return Seen(
        mode=mode,
        users=users,
        rate=rate,
        spent_s=max(ended_s - begun_s, 1e-3),
        outcomes=outcomes,
        latencies_s=sorted(line["took_s"] for line in answered),
        waits_s=sorted(line["timings"]["queue_ms"] / 1000 for line in answered),
        server={
            **{name: after[name] - before[name] for name in COUNTERS},
            "memory_mib": after["memory_mib"],
        },
    )


def scrape(url: str) -> dict[str, float]:
    """The service's counters, added up over their labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {name: _metric(text, pattern) for name, pattern in COUNTERS.items()}
    return {**found, "memory_mib": _metric(text, "process_resident_memory_bytes") / 2**20}


def summarise(results: Sequence[Seen], bound_s: float) -> dict[str, float | int | None]:
    """The few figures that a comparison quotes."""
    of_mode = {mode: [seen for seen in results if seen.mode == mode] for mode in MODES}
    single, offline = (next(iter(of_mode[mode]), None) for mode in ("SingleStream", "Offline"))
    valid = [seen.throughput for seen in of_mode["Server"] if seen.meets(bound_s)]
    saturated = None
    if offline is not None and offline.device_s:
        saturated = offline.throughput * offline.device_s
    return {
        "single_stream_p50_s": single and single.latency_s(0.5),
        "single_stream_p90_s": single and single.latency_s(0.9),
        "offline_pictures_per_s": offline and offline.throughput,
        "offline_of_device_time": saturated,
        "server_bound_s": bound_s,
        "server_pictures_per_s": max(valid, default=None),
        "wrong": sum(seen.wrong for seen in results),
    }


def is_loopback(url: str) -> bool:
    """Whether an address can only lead to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def quantile_of(ordered: Sequence[float], quantile: float) -> float | None:
    """The smallest value that so large a share does not exceed; None of nothing."""
    if not ordered:
        return None
    # Less than nothing is lost by the rounding of 0.99 * 100.
    return ordered[max(0, math.ceil(len(ordered) * quantile - 1e-9) - 1)]


def _saturation(results: Sequence[Seen]) -> float:
    """What Offline draws, else SingleStream, else one a second."""
    found = [seen.throughput for seen in results if seen.mode in ("SingleStream", "Offline")]
    return max(found, default=1.0) or 1.0


def _usual_bound_s(results: Sequence[Seen]) -> float:
    medians = [seen.latency_s(0.5) for seen in results if seen.mode == "SingleStream"]
    return BOUND_FACTOR * (medians[0] if medians and medians[0] else 1.0)


def _metric(text: str, pattern: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main())
