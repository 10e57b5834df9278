"""``fluxd bench``: how long a picture takes here, where the time goes, and what the floor is.

Loads the model as the service would, once for each combination of the settings that are
to vary; the measuring itself is ``fluxcore.bench``. A table for people comes first, then
one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from app.cli.console import UsageError, load_progress, say, step_progress
from app.engine.metadata import Provenance
from app.engine.packing import STRIP_THREADS, Packing, pack_picture
from app.main import BUNDLED_NOTE
from app.settings import LoadedSettings, Settings, load_settings, parse_size
from app.telemetry import configure_logging
from fluxcore.drawn import DrawnPicture
from fluxcore.params import GenerationParams
from fluxcore.version import __version__

if TYPE_CHECKING:
    from fluxcore import FluxPipeline
    from fluxcore.bench import SizeReport
    from fluxcore.runtime import Runtime

PROMPT = "a lighthouse on a cliff above a stormy sea, oil painting, evening light"
TABLE_COLUMNS = 110
Variant = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """The command's arguments. ``varied`` holds NAME=VALUE,VALUE of settings."""

    sizes: tuple[str, ...]
    runs: int
    steps: int | None
    seed: int
    varied: tuple[str, ...]
    chart: Path | None


@dataclass(frozen=True, slots=True)
class Start:
    """How long it took until the first picture could be asked for. Units: seconds.

    Attributes:
        ready_s: since the process began, of the first combination only.
    """

    import_s: float
    load_s: float
    warm_up_s: float
    ready_s: float | None


def bench(asked: Asked, flags: Mapping[str, Any], config: Path | None) -> None:
    """Run the command.

    Args:
        flags: settings given on the command line.

    Raises:
        UsageError, SettingsError, InvalidParamsError: it cannot work as given.
        FluxError, OSError: loading, drawing or writing failed.
    """
    begun_s = time.monotonic()
    variants = list(_variants(asked.varied))
    loaded = [load_settings({**flags, **variant}, config=config) for variant in variants]
    settings = loaded[0].values
    sizes: list[tuple[int, int] | None] = [_size(text) for text in asked.sizes] or [None]
    _check_chart(asked.chart)
    configure_logging("error" if settings.log_level == "error" else "warning", settings.log_format)
    if settings.model is None:
        say(BUNDLED_NOTE)
    reports: list[dict[str, Any]] = []
    for variant, values in zip(variants, loaded, strict=True):
        report, runtime = _measure(asked, sizes, variant, values, None if reports else begun_s)
        # The model is gone; the next one needs its place.
        runtime.release_memory()
        reports.append(report)
    if asked.chart is not None:
        from app.cli.bench_chart import draw_chart

        draw_chart(reports).save(asked.chart, "PNG")
        say(f"{asked.chart}")
    print(json.dumps({"fluxd": __version__, "variants": reports}, ensure_ascii=False))


def _measure(
    asked: Asked,
    sizes: Sequence[tuple[int, int] | None],
    variant: Variant,
    loaded: LoadedSettings,
    begun_s: float | None,
) -> tuple[dict[str, Any], Runtime]:
    """One combination of settings, as JSON, and where it ran; prints its tables."""
    pipe, start = _load(loaded.values, begun_s)
    from fluxcore.bench import Rates, measure_size

    rates = Rates(pipe.runtime)
    measured: list[SizeReport] = []
    with ThreadPoolExecutor(STRIP_THREADS) as strips:

        def pack(picture: DrawnPicture, params: GenerationParams) -> None:
            pack_picture(picture, Packing("png"), _made(picture, params, pipe), strips.map)

        for size in sizes:
            width, height = size or (pipe.info.default_side_px, pipe.info.default_side_px)
            params = GenerationParams(
                prompt=PROMPT, width=width, height=height, steps=asked.steps, seed=asked.seed
            )
            with step_progress() as bar:
                measured.append(
                    measure_size(
                        pipe,
                        rates,
                        params,
                        asked.runs,
                        pack,
                        lambda done, what=f"{width}x{height}": bar(done, asked.runs + 1, what),  # type: ignore[misc]
                    )
                )
    report = {
        "settings": dict(variant),
        "model": pipe.info.name,
        "parameters": dict(pipe.info.parameters),
        "weight_bytes": pipe.info.weight_bytes,
        "runtime": pipe.runtime.describe(),
        "start": {
            "import_s": start.import_s,
            "load_s": start.load_s,
            "warm_up_s": start.warm_up_s,
            "ready_s": start.ready_s,
        },
        "sizes": [size.as_json() for size in measured],
    }
    _print(report)
    return report, pipe.runtime


def _load(settings: Settings, begun_s: float | None) -> tuple[FluxPipeline, Start]:
    """The pipeline as the service loads and warms it, and how long that took."""
    from app.main import pipeline_loader

    import_s = time.monotonic()
    from fluxcore import FluxPipeline

    load_s = time.monotonic()
    # What is kept on the disk would turn the encoder's time into a file's.
    settings = settings.model_copy(update={"conditioning_store_bytes": 0})
    with load_progress() as bar:
        pipe = pipeline_loader(settings.model, settings)(
            lambda step: bar(step.done_bytes, step.total_bytes, step.component)
        )
    assert isinstance(pipe, FluxPipeline), "the loader loads this"
    warm_up_s = time.monotonic()
    with step_progress() as bar:
        pipe.warm_up(settings.warm_up_sizes_px, lambda done, total: bar(done, total, "warming up"))
    ready_s = time.monotonic()
    start = Start(
        import_s=load_s - import_s,
        load_s=warm_up_s - load_s,
        warm_up_s=ready_s - warm_up_s,
        ready_s=None if begun_s is None else ready_s - begun_s + _process_age_s(begun_s),
    )
    return pipe, start


def _process_age_s(moment_s: float) -> float:
    """How old this process was at a moment; 0 where the system does not tell exactly."""
    stat = Path("/proc/self/stat")
    if sys.platform != "linux" or not stat.exists():
        return 0.0
    import os

    ticks = int(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
    born_s = ticks / os.sysconf("SC_CLK_TCK")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - born_s
    return max(0.0, age_s - (time.monotonic() - moment_s))


def _variants(varied: Sequence[str]) -> Iterator[Variant]:
    """Every combination of the values to vary; one without any where nothing varies."""
    names, choices = [], []
    for text in varied:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise UsageError(f"--vary takes NAME=VALUE,VALUE; got {text!r}")
        names.append(name.strip().replace("-", "_"))
        choices.append([value.strip() for value in values.split(",")])
    for chosen in itertools.product(*choices):
        yield dict(zip(names, chosen, strict=True))


def _size(text: str) -> tuple[int, int]:
    try:
        return parse_size(f"{text}x{text}" if text.isdecimal() else text)
    except ValueError as error:
        raise UsageError(f"--sizes takes sides or sizes, such as 256 512x768: {error}") from None


def _check_chart(chart: Path | None) -> None:
    if chart is None:
        return
    if chart.suffix.lower() != ".png":
        raise UsageError(f"the chart's name must end in .png; got {str(chart)!r}")
    if not chart.parent.is_dir():
        raise UsageError(f"there is no directory {chart.parent}; create it first")


def _made(picture: DrawnPicture, params: GenerationParams, pipe: FluxPipeline) -> Provenance:
    return Provenance(
        prompt=params.prompt,
        negative_prompt=None,
        seed=params.seed or 0,
        width=picture.width,
        height=picture.height,
        steps=params.steps or pipe.info.default_steps,
        guidance=None,
        schedule=params.schedule,
        model=pipe.info.name,
        version=__version__,
    )


def _print(report: Mapping[str, Any]) -> None:
    """The tables of one combination."""
    console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS, highlight=False)
    runtime, start = report["runtime"], report["start"]
    varied = "".join(f", {name} {value}" for name, value in report["settings"].items())
    place = f"{runtime['device']} ({runtime['chip']})"
    console.print(f"{report['model']} on {place}, {runtime['precision']}{varied}", markup=False)
    ready = "" if start["ready_s"] is None else f"; ready {start['ready_s']:.1f} s after the start"
    console.print(
        f"import {start['import_s']:.1f} s, load {start['load_s']:.1f} s, "
        f"warm-up {start['warm_up_s']:.1f} s{ready}"
    )
    for size in report["sizes"]:
        console.print(_table(size))


def _table(size: Mapping[str, Any]) -> Table:
    table = Table(title=f"{size['width']}x{size['height']}, {size['runs']} warm pictures, ms")
    for name in ("stage", "first", "median", "p90", "spread", "floor", "reached", "TFLOP/s"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, spread in size["spans"].items():
        floor, reached = size["floor"].get(name), size["reached"].get(name)
        rate = size["rates_teraflops"].get(name)
        table.add_row(
            name,
            f"{size['first'][name]:.1f}",
            f"{spread['median']:.1f}",
            f"{spread['p90']:.1f}",
            f"{spread['most'] - spread['least']:.1f}",
            "" if floor is None else f"{floor:.1f}",
            "" if reached is None else f"{reached:.0%}",
            "" if rate is None else f"{rate:.3g}",
            style="bold" if name == "total" else None,
        )
    peaks = (size["device_peak_bytes"] / 1e9, size["host_peak_bytes"] / 1e9)
    table.caption = (
        "peak memory: device {:.2f} GB, host {:.2f} GB. TFLOP/s: the floor's. Reached: the "
        "floor over the median; of the total without packing.".format(*peaks)
    )
    return table
