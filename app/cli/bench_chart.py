"""The chart of ``fluxd bench``: for each size, the stages stacked above their floor.

Drawn with Pillow, so that it needs no plotting library where a machine is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH_PX = 1400
LEFT_PX = 250
RIGHT_PX = 330
TOP_PX = 110
BAR_PX = 34
FLOOR_BAR_PX = 18
ROW_PX = 86
FONT_PX = 18
TICKS = 6
INK, PALE, GRID = "#222222", "#777777", "#dddddd"
# Told apart by people who do not see all colours (Okabe and Ito's palette).
COLOURS = {
    "tokenise": "#999999",
    "text": "#0072b2",
    "denoise": "#e69f00",
    "vae": "#009e73",
    "host copy": "#cc79a7",
    "pack": "#56b4e9",
}
Bar = list[tuple[str, float]]


def draw_chart(reports: Sequence[Mapping[str, Any]]) -> Image.Image:
    """One row for each size of each report; the steps of a picture are parted by lines."""
    rows = [(report, size) for report in reports for size in report["sizes"]]
    height = TOP_PX + ROW_PX * len(rows) + 60
    chart = Image.new("RGB", (WIDTH_PX, height), "white")
    draw = ImageDraw.Draw(chart)
    longest = max(max(size["spans"]["total"]["median"], size["floor"]["total"]) for _, size in rows)
    step, end = _scale(longest)
    per_ms = (WIDTH_PX - LEFT_PX - RIGHT_PX) / end
    _head(draw, reports[0])
    _axis(draw, step, end, per_ms, height)
    for number, (report, size) in enumerate(rows):
        top = TOP_PX + ROW_PX * number + 14
        label = f"{size['width']}x{size['height']}"
        _text(draw, (LEFT_PX - 14, top + BAR_PX // 2), label, INK, "rm")
        varied = " ".join(report["settings"].values()) or report["runtime"]["precision"]
        below = top + BAR_PX + FLOOR_BAR_PX // 2
        _text(draw, (LEFT_PX - 14, below), f"{varied}, floor", PALE, "rm")
        measured, floor = list(_measured(size)), list(_floor(size))
        _bar(draw, measured, top, BAR_PX, per_ms)
        _bar(draw, floor, top + BAR_PX + 2, FLOOR_BAR_PX, per_ms)
        total, least = size["spans"]["total"]["median"], size["floor"]["total"]
        end_px = LEFT_PX + max(total, least) * per_ms + 12
        _text(draw, (end_px, top + BAR_PX // 2), f"{total:.4g} ms", INK, "lm")
        share = f"{least:.4g} ms, {size['reached']['total']:.0%} reached"
        _text(draw, (end_px, below), share, PALE, "lm")
    return chart


def _measured(size: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, spread in size["spans"].items():
        if name in COLOURS and name != "denoise":
            yield name, spread["median"]
        elif name.startswith("step "):
            yield "denoise", spread["median"]


def _floor(size: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((name, ms) for name, ms in size["floor"].items() if name != "total")


def _head(draw: ImageDraw.ImageDraw, report: Mapping[str, Any]) -> None:
    runtime = report["runtime"]
    title = f"{report['model']}, {runtime['chip']}, torch {runtime['torch']}: ms per picture"
    _text(draw, (20, 28), title, INK, "lm", FONT_PX + 4)
    left = 20.0
    for name, colour in COLOURS.items():
        draw.rectangle((left, 56, left + 18, 74), fill=colour)
        _text(draw, (left + 26, 65), name, INK, "lm")
        left += 60 + draw.textlength(name, font=ImageFont.load_default(FONT_PX))
    _text(draw, (left, 65), "above: median; below: floor; lines part the steps", PALE, "lm")


def _axis(draw: ImageDraw.ImageDraw, step: float, end: float, per_ms: float, height: int) -> None:
    for number in range(round(end / step) + 1):
        x = LEFT_PX + number * step * per_ms
        draw.line((x, TOP_PX, x, height - 46), fill=GRID)
        _text(draw, (x, height - 26), f"{number * step:.6g}", PALE, "mm")


def _bar(draw: ImageDraw.ImageDraw, bar: Bar, top: int, height: int, per_ms: float) -> None:
    left = float(LEFT_PX)
    for name, ms in bar:
        right = left + ms * per_ms
        draw.rectangle((left, top, max(left, right - 2), top + height - 1), fill=COLOURS[name])
        left = right


def _scale(longest: float) -> tuple[float, float]:
    """A round distance between grid lines, and where the last one stands."""
    rough = max(longest, 1e-3) / TICKS
    power: float = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return step, step * math.ceil(longest / step)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: str,
    anchor: str,
    size_px: int = FONT_PX,
) -> None:
    draw.text(place, text, fill=colour, anchor=anchor, font=ImageFont.load_default(size_px))
