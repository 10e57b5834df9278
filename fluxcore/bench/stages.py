"""Times of one size: each stage of a picture by itself, the device waited for around it.

Drives the pipeline's public stages in the order in which a job runs them. A run draws one
whole picture; the first is kept apart, since it pays for what later ones find ready.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fluxcore.bench.operations import operations, stage_work
from fluxcore.bench.rates import Rates
from fluxcore.drawn import DrawnPicture
from fluxcore.params import GenerationParams
from fluxcore.pipeline import FluxPipeline
from fluxcore.pipeline.encoded import NO_REFERENCES, EncodedJob
from fluxcore.runtime import host_peak_bytes

T = TypeVar("T")
Pack = Callable[[DrawnPicture, GenerationParams], object]
Times = dict[str, float]
"""Milliseconds by span, in the order in which they ran."""

TEXT_HIT = "text, cached"
"""Measured in every run, but no part of its total: the prompt counts as not cached."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Some times in milliseconds, as a distribution."""

    median: float
    p90: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(*(4 * (values[0],)))
        p90 = statistics.quantiles(values, n=10, method="inclusive")[-1]
        return cls(statistics.median(values), p90, min(values), max(values))


@dataclass(frozen=True, slots=True)
class SizeReport:
    """What one size takes. Units: milliseconds, bytes, 10**12 operations.

    Attributes:
        first: the first picture of this size, by span and as ``total``.
        spans: tokenise, text, step 1 ..., vae, host copy, pack and ``total`` (all of them),
            and text with the prompt cached.
        floor: what the products, attention and convolutions of text, denoise and vae take
            alone, and the copying.
        reached: floor over the median, by stage; 1 is the floor.
    """

    width: int
    height: int
    runs: int
    first: Times
    spans: dict[str, Spread]
    floor: Times
    reached: Times
    teraflop: dict[str, float]
    rates_teraflops: dict[str, float]
    device_peak_bytes: int
    host_peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def measure_size(
    pipe: FluxPipeline,
    rates: Rates,
    params: GenerationParams,
    runs: int,
    pack: Pack,
    report: Callable[[int], None],
) -> SizeReport:
    """Draw one size several times, then time its parts.

    Args:
        params: what to draw, with width and height.
        pack: what is done with the picture at the end of each run.
        report: called with the number of pictures done.
    """
    job = pipe.prepare(params)
    width, height, steps = job.params.width, job.params.height, job.params.steps
    prompts = 1 if job.params.guidance is None else 2
    copy_ms = rates.host_copy_ms(width, height)
    pipe.runtime.reset_peak()
    first = _one_run(pipe, params, pack, copy_ms)
    report(1)
    counted = []
    for done in range(runs):
        counted.append(_one_run(pipe, params, pack, copy_ms))
        report(done + 2)
    device_peak, host_peak = pipe.runtime.peak_bytes(), host_peak_bytes()
    spans = {name: Spread.of([times[name] for times in counted]) for name in counted[0]}

    work = stage_work(pipe.config, width, height, steps)
    stages = {
        "text": [(work["text"], prompts)],
        "denoise": [
            (work["text tokens"], prompts),
            # The pictures counted find that of the first, where it is kept.
            (work["schedule"], 0 if len(pipe.modulations) else 1),
            (work["step"], steps * prompts),
        ],
        "vae": [(work["vae"], 1)],
    }
    floor = {
        name: sum(rates.floor_ms(part) * times for part, times in parts)
        for name, parts in stages.items()
    }
    floor["host copy"] = copy_ms
    pipe.runtime.release_memory()
    teraflop = {
        name: sum(operations(part) * times for part, times in parts) / 1e12
        for name, parts in stages.items()
    }
    return SizeReport(
        width=width,
        height=height,
        runs=runs,
        first=first,
        spans=spans,
        floor={**floor, "total": sum(floor.values())},
        reached=_reached(floor, spans),
        teraflop=teraflop,
        rates_teraflops={name: teraflop[name] / floor[name] * 1000 for name in teraflop},
        device_peak_bytes=device_peak,
        host_peak_bytes=host_peak,
    )


def _one_run(pipe: FluxPipeline, params: GenerationParams, pack: Pack, copy_ms: float) -> Times:
    """One picture, of a prompt that the cache does not have."""
    times: Times = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        pipe.runtime.synchronize()
        begun = time.perf_counter()
        value = work()
        pipe.runtime.synchronize()
        times[name] = (time.perf_counter() - begun) * 1000
        return value

    job = pipe.prepare(params)
    timed("tokenise", lambda: pipe.tokenizer.encode(params.prompt))
    pipe.conditioning_cache.forget_memory()
    timed("text", lambda: pipe.encode_text(job))
    # Done again in there, and so taken from its time; likewise the copy below.
    times["text"] = max(0.0, times["text"] - times["tokenise"])
    timed(TEXT_HIT, lambda: pipe.encode_text(job))
    encoded = EncodedJob(*pipe.encode_text(job), NO_REFERENCES)
    steps = pipe.denoise(job, 0, encoded)
    for number in range(1, job.params.steps + 1):
        step = timed(f"step {number}", lambda: next(steps))
    picture = timed("vae", lambda: pipe.decode(step.latents, job.params.width, job.params.height))
    times["host copy"] = min(copy_ms, times["vae"])
    times["vae"] -= times["host copy"]
    timed("pack", lambda: pack(picture, params))
    times["denoise"] = sum(ms for name, ms in times.items() if name.startswith("step "))
    beside = (TEXT_HIT, "denoise")
    times["total"] = sum(ms for name, ms in times.items() if name not in beside)
    return times


def _reached(floor: Times, spans: dict[str, Spread]) -> Times:
    """Shares of the floor by stage, and of all stages together, packing left out."""
    shares = {name: ms / spans[name].median for name, ms in floor.items() if name != "host copy"}
    drawn = spans["total"].median - spans["pack"].median
    return {**shares, "total": sum(floor.values()) / drawn}
