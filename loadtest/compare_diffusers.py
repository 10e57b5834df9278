"""fluxd and diffusers on one checkpoint, side by side: times, memory, and how far apart.

    python loadtest/compare_diffusers.py CHECKPOINT --sizes 256 512 --runs 5 --compiled
    python loadtest/compare_diffusers.py CHECKPOINT --separate
    python loadtest/compare_diffusers.py CHECKPOINT --http

All engines are loaded into one process and draw in turns, so that what else the machine
does falls on all of them. With --compiled, diffusers draws a second time with its
transformer and decoder compiled; its text encoder stays as it is. With --http a service of
its own takes turns with them: its total is from the request to all of the PNG file, while the
others' end with a picture in memory; its first picture comes after its warm-up, and its
memory is not told. Where two models do not fit, or a peak of memory is asked for, which
belongs to a process, --separate gives each engine a process of its own, one after the other.

All get the same prompt, seed and sizes, and so the same noise. The distance of their
conditioning, final latents and pictures from eager diffusers is printed next to the
times, so that a fast wrong answer shows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image

from fluxcore.runtime import host_peak_bytes

T = TypeVar("T")
Times = dict[str, float]

PROMPT = "a lighthouse on a cliff above a stormy sea, oil painting"
SEED = 42
FLUXD, HTTP = "fluxd", "fluxd over HTTP"
EAGER, COMPILED = "diffusers", "diffusers compiled"


@dataclass
class Drawn:
    """What one engine made. Times in milliseconds.

    Shapes: embeddings [1, 512, 3 D], latents [1, h w, C], picture [height, width, 3].
    """

    times: Times
    embeddings: np.ndarray | None  # None where only the picture is told
    latents: np.ndarray | None
    picture: np.ndarray


class Engine(Protocol):
    """A loaded model that draws ``PROMPT`` from ``SEED``, its prompt not cached."""

    def draw(self, side_px: int) -> Drawn: ...


def main() -> None:
    from flags import assignment, count, side_px

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", type=side_px, nargs="+", default=[256])
    parser.add_argument("--steps", type=count, default=4)
    parser.add_argument("--runs", type=count, default=3, help="counted runs after the first one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--set", action="append", default=[], type=assignment, dest="settings", metavar="NAME=VALUE"
    )
    parser.add_argument("--compiled", action="store_true", help="compiled diffusers, too")
    parser.add_argument("--http", action="store_true", help="a service of its own, too")
    parser.add_argument("--separate", action="store_true", help="a process for each engine")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.checkpoint / "model_index.json").is_file():
        parser.error(f"{args.checkpoint} is no directory of a model: it has no model_index.json")
    names = [FLUXD, *([HTTP] if args.http else []), EAGER]
    names += [COMPILED] if args.compiled else []
    if args.engine:
        print(json.dumps(compare(args, [args.engine])))
        return
    report = compare_apart(args, names) if args.separate else compare(args, names)
    _print_table(report, names)
    print(json.dumps(report))


def compare(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Load the engines, let them draw in turns, and measure how far apart they are."""
    with ExitStack() as opened:
        return _in_turns(args, load(args, names, opened))


def _in_turns(
    args: argparse.Namespace, engines: Mapping[str, tuple[Engine, dict[str, float | None]]]
) -> dict[str, Any]:
    """Each size, drawn by all engines again and again."""
    report: dict[str, Any] = {"start": {}, "sizes": {}}
    report["start"] = {name: found for name, (_, found) in engines.items()}
    for side in args.sizes:
        drawn: dict[str, list[Drawn]] = {name: [] for name in engines}
        peaks: dict[str, float | None] = {}  # a service's memory is its own process's
        for _ in range(args.runs + 1):
            for name, (engine, _) in engines.items():
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                drawn[name].append(engine.draw(side))
                peaks[name] = None if name == HTTP else _device_peak_bytes() / 1e9
        lasts = {name: made[-1] for name, made in drawn.items()}
        if args.keep:
            _save(args.keep, side, lasts)
        report["sizes"][str(side)] = {
            "engines": {
                name: {**_summary(made), "device_peak_gb": peaks[name]}
                for name, made in drawn.items()
            },
            "distances": _distances(lasts),
        }
    report["host_peak_gb"] = host_peak_bytes() / 1e9
    return report


def compare_apart(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The same with a process for each engine, one after the other."""
    report: dict[str, Any] = {"start": {}, "sizes": {}, "host_peak_gb": {}}
    with tempfile.TemporaryDirectory() as kept:
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--engine", name, "--keep", kept]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(child.stdout.splitlines()[-1])
            report["start"] |= found["start"]
            report["host_peak_gb"][name] = None if name == HTTP else found["host_peak_gb"]
            for side, of_size in found["sizes"].items():
                place = report["sizes"].setdefault(side, {"engines": {}})
                place["engines"] |= of_size["engines"]
        for side in args.sizes:
            lasts = _load_kept(Path(kept), side, names)
            report["sizes"][str(side)]["distances"] = _distances(lasts)
    return report


def load(
    args: argparse.Namespace, names: Sequence[str], opened: ExitStack
) -> dict[str, tuple[Engine, dict[str, float | None]]]:
    """The engines by name, and how long each took to load; ``opened`` ends a service."""
    from fluxcore.runtime import choose_runtime

    runtime = choose_runtime(args.device, args.dtype)
    device, dtype = str(runtime.device), runtime.dtypes.weights
    found: dict[str, tuple[Engine, dict[str, float | None]]] = {}
    theirs: Any = None
    for name in names:
        begun = time.perf_counter()
        engine: Engine
        if name == FLUXD:
            engine = Fluxd(args)
        elif name == HTTP:
            engine = OverHttp(args, opened)
        else:
            theirs = theirs or load_diffusers(args.checkpoint, device, dtype)
            engine = Diffusers(theirs, args.steps, runtime.synchronize, compiled=name == COMPILED)
        seconds = time.perf_counter() - begun
        peak_gb = None if name == HTTP else host_peak_bytes() / 1e9
        found[name] = (engine, {"load_s": seconds, "host_peak_gb": peak_gb})
    return found


class Fluxd:
    """Ours, with the settings that the service would have."""

    def __init__(self, args: argparse.Namespace) -> None:
        from flags import as_settings

        from app.main import pipeline_loader
        from app.settings import load_settings

        given = as_settings(args.settings)
        given |= {"device": args.device, "dtype": args.dtype, "conditioning_store_bytes": "0"}
        self._pipe: Any = pipeline_loader(args.checkpoint, load_settings(given).values)(
            lambda step: None
        )
        self._steps = args.steps

    def draw(self, side_px: int) -> Drawn:
        from fluxcore import GenerationParams

        params = GenerationParams(
            prompt=PROMPT, width=side_px, height=side_px, steps=self._steps, guidance=1.0, seed=SEED
        )
        self._pipe.conditioning_cache.forget_memory()
        latents: list[Any] = []
        result = self._pipe.generate(params, lambda step, _: latents.append(step.latents))
        embeddings = self._pipe.encode_prompt(PROMPT).embeddings
        return Drawn(
            result.timings, _host(embeddings), _host(latents[-1]), np.asarray(result.images[0])
        )


class OverHttp:
    """Ours as a client meets it, with the same settings, in a process of its own."""

    def __init__(self, args: argparse.Namespace, opened: ExitStack) -> None:
        from served import Service

        sizes = ",".join(f"{side}x{side}" for side in args.sizes)
        chosen = [f"device={args.device}", f"dtype={args.dtype}", f"warm_up_sizes={sizes}"]
        # Nothing is left behind, unless a place for it is named among the settings.
        kept = opened.enter_context(tempfile.TemporaryDirectory())
        chosen += [f"data_dir={kept}", *args.settings]
        chosen += ["conditioning_cache_bytes=0", "conditioning_store_bytes=0"]
        self._service = opened.enter_context(Service(args.checkpoint, chosen))
        self._steps = args.steps

    def draw(self, side_px: int) -> Drawn:
        asked = {"prompt": PROMPT, "size": f"{side_px}x{side_px}", "seed": SEED}
        answer = self._service.draw({**asked, "steps": self._steps, "guidance": 1.0})
        assert not answer.is_cache_hit, "the prompt is to be read anew for every picture"
        with Image.open(io.BytesIO(answer.png)) as picture:
            pixels = np.asarray(picture)
        return Drawn({**answer.stages_ms, "total": answer.took_ms}, None, None, pixels)


def load_diffusers(checkpoint: Path, device: str, dtype: torch.dtype) -> Any:
    """Its pipeline, as its documentation loads it."""
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Diffusers:
    """Flux2KleinPipeline, stage by stage; compiled forms share the eager one's weights."""

    def __init__(
        self, pipe: Any, steps: int, synchronize: Callable[[], None], *, compiled: bool
    ) -> None:
        self._steps, self._synchronize = steps, synchronize
        self._pipe, self._decode = pipe, pipe.vae.decode
        if compiled:
            parts = {**pipe.components, "transformer": torch.compile(pipe.transformer)}
            self._pipe = type(pipe)(**parts, is_distilled=pipe.config.is_distilled)
            self._pipe.set_progress_bar_config(disable=True)
            self._decode = torch.compile(pipe.vae.decode)

    def draw(self, side_px: int) -> Drawn:
        pipe, times = self._pipe, Times()

        def timed(stage: str, work: Callable[[], T]) -> T:
            self._synchronize()
            begun = time.perf_counter()
            # Not inference_mode: compiled code would be made anew for its tensors.
            with torch.no_grad():
                value = work()
            self._synchronize()
            times[stage] = (time.perf_counter() - begun) * 1000
            return value

        def decode(latents: Any) -> Any:
            return pipe.image_processor.postprocess(self._decode(latents).sample)[0]

        def noise() -> torch.Tensor:
            # What fluxd draws: PyTorch 2.11 draws other numbers in bfloat16 than in float32.
            shape = (1, pipe.transformer.config.in_channels, side_px // 16, side_px // 16)
            return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(SEED))

        embeddings = timed("text", lambda: pipe.encode_prompt(PROMPT)[0])
        latents = timed(
            "denoise",
            lambda: (
                pipe(
                    prompt_embeds=embeddings,
                    height=side_px,
                    width=side_px,
                    num_inference_steps=self._steps,
                    guidance_scale=1.0,
                    latents=noise(),
                    output_type="latent",
                ).images
            ),
        )
        picture = timed("decode", lambda: decode(latents))
        times["total"] = sum(times.values())
        tokens = _normalised_tokens(pipe, latents)
        return Drawn(times, _host(embeddings), _host(tokens), np.asarray(picture))


def _normalised_tokens(pipe: Any, latents: Any) -> Any:
    """Undo what diffusers does to latents before it returns them. [B, C, h, w] -> [B, L, 4 C]."""
    patched = pipe._patchify_latents(latents).float()
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1).float()
    deviation = (pipe.vae.bn.running_var.float() + pipe.vae.config.batch_norm_eps).sqrt()
    return pipe._pack_latents((patched - mean) / deviation.view(1, -1, 1, 1))


def _host(tensor: Any) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _device_peak_bytes() -> int:
    """On CUDA since the last reset, with all that is loaded; elsewhere the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if torch.backends.mps.is_available():
        return torch.mps.driver_allocated_memory()
    return host_peak_bytes()


def _summary(made: Sequence[Drawn]) -> dict[str, Any]:
    """First picture, then the median and the spread of the counted ones, in ms per stage."""
    first, counted = made[0].times, [drawn.times for drawn in made[1:]]
    stages = {stage: [times[stage] for times in counted] for stage in first}
    return {
        "first_ms": first["total"],
        "median_ms": {stage: statistics.median(values) for stage, values in stages.items()},
        "spread_ms": {stage: max(values) - min(values) for stage, values in stages.items()},
        "runs": len(counted),
    }


def _save(place: Path, side: int, drawn: Mapping[str, Drawn]) -> None:
    for name, made in drawn.items():
        arrays = {"embeddings": made.embeddings, "latents": made.latents, "picture": made.picture}
        kept = {what: array for what, array in arrays.items() if array is not None}
        np.savez(place / f"{name}-{side}.npz", **kept)


def _load_kept(place: Path, side: int, names: Sequence[str]) -> dict[str, Drawn]:
    found = {}
    for name in names:
        with np.load(place / f"{name}-{side}.npz") as kept:
            arrays = kept.get("embeddings"), kept.get("latents"), kept["picture"]
            found[name] = Drawn({}, *arrays)
    return found


def _distances(drawn: Mapping[str, Drawn]) -> dict[str, dict[str, float]]:
    """Of each engine from eager diffusers."""
    if EAGER not in drawn:
        return {}
    reference = drawn[EAGER]
    return {
        name: distance(made, reference) for name, made in drawn.items() if made is not reference
    }


def distance(ours: Drawn, theirs: Drawn) -> dict[str, float]:
    """Relative root mean square of tensors; of pictures mean, largest and PSNR of 255."""
    found = {}
    for name in ("embeddings", "latents"):
        if getattr(ours, name) is None:
            continue
        a, b = getattr(ours, name).astype(np.float64), getattr(theirs, name).astype(np.float64)
        found[f"{name}_relative_rms"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    apart = np.abs(ours.picture.astype(int) - theirs.picture.astype(int))
    found["picture_mean_abs"] = float(apart.mean())
    found["picture_max_abs"] = float(apart.max())
    mean_square = float((apart.astype(np.float64) ** 2).mean())
    found["picture_psnr_db"] = float(10 * np.log10(255**2 / max(mean_square, 1e-12)))
    return found


def _print_table(report: Mapping[str, Any], names: Sequence[str]) -> None:
    def row(label: str, values: Sequence[float | None]) -> None:
        shown = ("-" if value is None else f"{value:.4g}" for value in values)
        print(f"{label:28}" + "".join(f"{value:>19}" for value in shown))

    print(f"{'':28}" + "".join(f"{name:>19}" for name in names))
    row("load, s", [report["start"][name]["load_s"] for name in names])
    if isinstance(report["host_peak_gb"], dict):
        row("host peak, GB", [report["host_peak_gb"][name] for name in names])
    for side, of_size in report["sizes"].items():
        engines = of_size["engines"]
        row(f"{side}: first picture, ms", [engines[name]["first_ms"] for name in names])
        for stage in ("text", "denoise", "decode", "total"):
            row(f"{side}: {stage}, ms", [engines[name]["median_ms"][stage] for name in names])
        row("  spread of the total, ms", [engines[name]["spread_ms"]["total"] for name in names])
        eager = engines[EAGER]["median_ms"]["total"]
        row("  total, of eager's", [engines[name]["median_ms"]["total"] / eager for name in names])
        if not isinstance(report["host_peak_gb"], dict) or torch.cuda.is_available():
            row("  device peak, GB", [engines[name]["device_peak_gb"] for name in names])
        for name, found in of_size["distances"].items():
            shown = "  ".join(f"{what} {value:.4g}" for what, value in found.items())
            print(f"  {name} from eager: {shown}")


if __name__ == "__main__":
    main()
