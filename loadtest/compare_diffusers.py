"""fluxd and diffusers on one checkpoint, side by side: times, memory, and how far apart.

    python loadtest/compare_diffusers.py CHECKPOINT --sizes 256 512 --runs 3

Each engine runs in a process of its own, because two full-size models do not fit into
24 GB and a peak of memory belongs to a process. Both get the same prompt, seed and
sizes; the difference of their conditioning, final latents and pictures is printed next
to the times, so that a fast wrong answer shows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a lighthouse on a cliff above a stormy sea, oil painting"
SEED = 42
ENGINES = ("fluxd", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3, help="counted runs after one warm-up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run = run_fluxd if args.engine == "fluxd" else run_diffusers
        print(json.dumps(run(args)))
        return
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run both engines one after the other and print the table."""
    reports = {}
    with tempfile.TemporaryDirectory() as keep:
        for engine in ENGINES:
            command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
            child = subprocess.run(
                [*command, "--keep", keep], check=True, stdout=subprocess.PIPE, text=True
            )
            reports[engine] = json.loads(child.stdout.splitlines()[-1])
        distances = {size: _distances(Path(keep), size) for size in args.sizes}
    _print_table(reports, distances)
    print(json.dumps({"engines": reports, "distances": distances}))


def run_fluxd(args: argparse.Namespace) -> dict[str, Any]:
    """Load and time fluxcore; keep its tensors."""
    started = time.perf_counter()
    from fluxcore import FluxPipeline, GenerationParams

    imported = time.perf_counter()
    pipe = FluxPipeline.load(args.checkpoint, device=args.device, dtype=args.dtype)
    loaded = time.perf_counter()
    report = _start_report(started, imported, loaded)
    for size in args.sizes:
        params = GenerationParams(
            prompt=PROMPT, width=size, height=size, steps=args.steps, guidance=1.0, seed=SEED
        )
        kept: dict[str, Any] = {}

        def draw(
            params: GenerationParams = params, kept: dict[str, Any] = kept
        ) -> dict[str, float]:
            pipe.conditioning_cache.clear()
            result = pipe.generate(params, lambda step, _: kept.update(latents=step.latents))
            kept["picture"] = np.asarray(result.images[0])
            return result.timings

        report["sizes"][size] = _time_runs(draw, args.runs)
        report["sizes"][size]["device_peak_gb"] = pipe.runtime.peak_bytes() / 1e9
        embeddings = pipe.encode_prompt(PROMPT).embeddings
        _save(args.keep / f"fluxd-{size}.npz", embeddings, kept["latents"], kept["picture"])
    return _end_report(report)


def run_diffusers(args: argparse.Namespace) -> dict[str, Any]:
    """Load and time diffusers' Flux2KleinPipeline, eager; keep its tensors."""
    started = time.perf_counter()
    import torch
    from diffusers import Flux2KleinPipeline

    imported = time.perf_counter()
    pipe = Flux2KleinPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    pipe.to(args.device)
    loaded = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    report = _start_report(started, imported, loaded)
    on_cuda = args.device.startswith("cuda")

    def timed(work: Callable[[], Any], times: dict[str, float], stage: str) -> Any:
        begun = time.perf_counter()
        with torch.inference_mode():
            value = work()
        if on_cuda:
            torch.cuda.synchronize()
        elif args.device == "mps":
            torch.mps.synchronize()
        times[stage] = (time.perf_counter() - begun) * 1000
        return value

    for size in args.sizes:
        kept: dict[str, Any] = {}

        def draw(size: int = size, kept: dict[str, Any] = kept) -> dict[str, float]:
            times: dict[str, float] = {}
            embeddings = timed(lambda: pipe.encode_prompt(PROMPT)[0], times, "text")
            latents = timed(
                lambda: (
                    pipe(
                        prompt_embeds=embeddings,
                        height=size,
                        width=size,
                        num_inference_steps=args.steps,
                        guidance_scale=1.0,
                        generator=torch.Generator("cpu").manual_seed(SEED),
                        output_type="latent",
                    ).images
                ),
                times,
                "denoise",
            )
            picture = timed(
                lambda: pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)[0],
                times,
                "decode",
            )
            times["total"] = sum(times.values())
            kept.update(embeddings=embeddings, latents=latents, picture=np.asarray(picture))
            return times

        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        report["sizes"][size] = _time_runs(draw, args.runs)
        peak = _host_peak_bytes()
        if on_cuda:
            peak = torch.cuda.max_memory_allocated()
        elif args.device == "mps":
            peak = torch.mps.driver_allocated_memory()
        report["sizes"][size]["device_peak_gb"] = peak / 1e9
        tokens = _normalised_tokens(pipe, kept["latents"])
        _save(args.keep / f"diffusers-{size}.npz", kept["embeddings"], tokens, kept["picture"])
    return _end_report(report)


def _normalised_tokens(pipe: Any, latents: Any) -> Any:
    """Undo what diffusers does to latents before it returns them. [B, C, h, w] -> [B, L, 4 C]."""
    patched = pipe._patchify_latents(latents).float()
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1).float()
    deviation = (pipe.vae.bn.running_var.float() + pipe.vae.config.batch_norm_eps).sqrt()
    return pipe._pack_latents((patched - mean) / deviation.view(1, -1, 1, 1))


def _time_runs(draw: Callable[[], dict[str, float]], runs: int) -> dict[str, Any]:
    """First picture, then the median and the spread of the counted ones, in ms per stage."""
    first = draw()
    counted = [draw() for _ in range(runs)]
    stages = {stage: [times[stage] for times in counted] for stage in counted[0]}
    return {
        "first_ms": first["total"],
        "median_ms": {stage: statistics.median(values) for stage, values in stages.items()},
        "spread_ms": {stage: max(values) - min(values) for stage, values in stages.items()},
        "runs": runs,
    }


def _start_report(started: float, imported: float, loaded: float) -> dict[str, Any]:
    return {
        "import_s": imported - started,
        "load_s": loaded - imported,
        "peak_after_load_gb": _host_peak_bytes() / 1e9,
        "sizes": {},
    }


def _end_report(report: dict[str, Any]) -> dict[str, Any]:
    report["peak_gb"] = _host_peak_bytes() / 1e9
    return report


def _host_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _save(path: Path, embeddings: Any, latents: Any, picture: np.ndarray) -> None:
    arrays = {"embeddings": embeddings, "latents": latents}
    values = {name: tensor.float().cpu().numpy() for name, tensor in arrays.items()}
    np.savez(path, picture=picture, **values)


def _distances(keep: Path, size: int) -> dict[str, float]:
    ours, theirs = (np.load(keep / f"{engine}-{size}.npz") for engine in ENGINES)
    found = {}
    for name in ("embeddings", "latents"):
        a, b = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        found[f"{name}_relative_rms"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    apart = np.abs(ours["picture"].astype(int) - theirs["picture"].astype(int))
    found["picture_mean_abs"] = float(apart.mean())
    found["picture_max_abs"] = float(apart.max())
    mean_square = float((apart.astype(np.float64) ** 2).mean())
    found["picture_psnr_db"] = float(10 * np.log10(255**2 / max(mean_square, 1e-12)))
    return found


def _print_table(reports: dict[str, Any], distances: dict[int, dict[str, float]]) -> None:
    print(f"{'':28}" + "".join(f"{engine:>14}" for engine in ENGINES))

    def row(label: str, *keys: Any) -> None:
        values = []
        for engine in ENGINES:
            value: Any = reports[engine]
            for key in keys:
                value = value[key]
            values.append(value)
        print(f"{label:28}" + "".join(f"{value:14.2f}" for value in values))

    for label, key in (
        ("import, s", "import_s"),
        ("load, s", "load_s"),
        ("host peak after load, GB", "peak_after_load_gb"),
        ("host peak, GB", "peak_gb"),
    ):
        row(label, key)
    for size, distance in distances.items():
        row(f"{size}: first picture, ms", "sizes", str(size), "first_ms")
        for stage in ("text", "denoise", "decode", "total"):
            row(f"{size}: {stage}, ms", "sizes", str(size), "median_ms", stage)
        row(f"{size}: device peak, GB", "sizes", str(size), "device_peak_gb")
        for name, value in distance.items():
            print(f"  {size}: {name} {value:.4g}")


if __name__ == "__main__":
    main()
