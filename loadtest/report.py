"""What a run under load looked like, as report.html with report.png in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from run import Seen

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.25em .6em}
td{text-align:right}td:first-child,th{text-align:left}img{width:100%}"""
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#777777"
Cell = Callable[["Seen"], Any]
CLIENT: dict[str, Cell] = {
    "answered": lambda seen: seen.outcomes.get("answered", 0),
    "refused": lambda seen: seen.outcomes.get("refused", 0),
    "left": lambda seen: seen.outcomes.get("left", 0),
    "wrong": lambda seen: seen.wrong,
    "a second": lambda seen: seen.throughput,
    "p50, s": lambda seen: seen.latency_s(0.5),
    "p90, s": lambda seen: seen.latency_s(0.9),
    "p99, s": lambda seen: seen.latency_s(0.99),
    "queue p50, s": lambda seen: seen.wait_s(0.5),
    "queue p99, s": lambda seen: seen.wait_s(0.99),
}
SERVER: dict[str, Cell] = {
    "pictures": lambda seen: seen.server["pictures"],
    "refused": lambda seen: seen.server["refused"],
    "clients left": lambda seen: seen.server["left"],
    "device busy": lambda seen: f"{seen.server['device_busy_s'] / seen.spent_s:.0%}",
    "device s a picture": lambda seen: seen.device_s,
    "mean queue wait, s": lambda seen: _share(seen.server["waited_s"], seen.server["waits"]),
    "processor s a picture": lambda seen: _share(
        seen.server["processor_s"], seen.server["pictures"]
    ),
    "loop over 50 ms late": lambda seen: seen.server["loop_lags"] - seen.server["loop_on_time"],
    "memory, MiB": lambda seen: seen.server["memory_mib"],
}


def write_report(
    place: Path,
    title: str,
    results: Sequence[Seen],
    summary: Mapping[str, Any],
    bound_s: float,
) -> None:
    """Write both files."""
    chart = place / "report.png"
    draw(results, bound_s).savefig(chart, dpi=110)
    picture = base64.b64encode(chart.read_bytes()).decode()
    rows = [(name.replace("_", " "), value) for name, value in summary.items()]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>fluxd under load</title>
<style>{STYLE}</style><h1>fluxd under load</h1><p>{html.escape(title)}</p>
{_table(("figure", "value"), rows)}
<img alt="latency over load, queue wait, throughput" src="data:image/png;base64,{picture}">
<h2>What the clients saw</h2>{_of_modes(results, CLIENT)}
<h2>What the service counted meanwhile</h2>{_of_modes(results, SERVER)}</html>
"""
    (place / "report.html").write_text(page, encoding="utf-8")


def draw(results: Sequence[Seen], bound_s: float) -> Any:
    """Latency and queue wait over load, throughput over load, and latencies by mode."""
    figure, (over_load, wait, rate, modes) = plt.subplots(1, 4, figsize=(19, 4.6))
    server = [seen for seen in results if seen.mode == "Server" and seen.latencies_s]
    loads = [seen.rate for seen in server]
    for quantile, colour in ((0.5, BLUE), (0.9, ORANGE), (0.99, GREEN)):
        label = f"p{quantile * 100:.0f}"
        latencies = [seen.latency_s(quantile) for seen in server]
        over_load.plot(loads, latencies, "o-", color=colour, label=label)
        wait.plot(
            loads, [seen.wait_s(quantile) for seen in server], "o-", color=colour, label=label
        )
    over_load.axhline(bound_s, color=GREY, linestyle="--", label="bound on p99")
    over_load.set(title="Latency over load", xlabel="arrivals a second", ylabel="seconds")
    means = [_share(seen.server["waited_s"], seen.server["waits"]) for seen in server]
    wait.plot(loads, means, "x:", color=GREY, label="mean, by the service")
    wait.set(title="Queue wait over load", xlabel="arrivals a second", ylabel="seconds")
    rate.plot(loads, [seen.throughput for seen in server], "o-", color=BLUE, label="answered")
    rate.plot(loads, loads, ":", color=GREY, label="asked for")
    for seen in results:
        if seen.mode == "Offline":
            rate.axhline(seen.throughput, color=ORANGE, linestyle="--", label="Offline")
            if seen.device_s:
                of_device = 1 / seen.device_s
                rate.axhline(of_device, color=GREEN, linestyle=":", label="1 / device time")
    rate.set(title="Throughput", xlabel="arrivals a second", ylabel="pictures a second")
    others = [seen for seen in results if seen.mode != "Server" and seen.latencies_s]
    if others:
        modes.boxplot([seen.latencies_s for seen in others], whis=(0, 99), showfliers=False)
        modes.set_xticks(range(1, len(others) + 1), [seen.mode for seen in others])
    modes.set(title="Latency by mode, up to p99", ylabel="seconds")
    for axes in (over_load, wait, rate):
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend()
    modes.set(ylim=(0, None))
    figure.tight_layout()
    plt.close(figure)
    return figure


def _of_modes(results: Sequence[Seen], columns: Mapping[str, Cell]) -> str:
    rows = []
    for seen in results:
        name = seen.mode if seen.rate is None else f"{seen.mode} at {seen.rate:.3g}/s"
        rows.append((name, *(cell(seen) for cell in columns.values())))
    return _table(("mode", *columns), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        inner = "".join(f"<{tag}>{html.escape(_shown(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _shown(cell: Any) -> str:
    if cell is None:
        return "none"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _share(whole: float, parts: float) -> float | None:
    return whole / parts if parts else None
