"""Where the time goes on a CUDA GPU: every way of running the networks, stage by stage.

    python loadtest/cuda_stages.py --sizes 256 512 1024 --out .models/cuda

Draws a model of random weights straight into the GPU's memory, so that no checkpoint is
needed, and then measures, one after the other: the rates that the chip reaches at the
model's own shapes (the floor), the networks as they are, with CUDA graphs, compiled,
compiled with CUDA graphs, fp8, and alternatives to what is built in. How far results are
apart is printed beside the times, so that a fast wrong answer shows. A phase that fails
prints why, and the next one goes on. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.config import TEXT_TOKENS, CheckpointConfig, read_checkpoint_config
from fluxcore.kernels import plain_attention
from fluxcore.models import AutoEncoder, Flux2Transformer, Qwen3Encoder, flux2, qwen3, vae
from fluxcore.pipeline.latents import draw_noise
from fluxcore.pipeline.load import Components
from fluxcore.pipeline.result import ModelInfo
from fluxcore.pipeline.tables import RopeTables
from fluxcore.runtime import Runtime, choose_runtime
from fluxcore.runtime.attention import cudnn_attention, scored_attention
from fluxcore.runtime.quantised import FP8, quantise
from fluxcore.text import PromptTokenizer
from fluxcore.weights import random_architecture as architecture
from fluxcore.weights import weight_plan
from fluxcore.weights.random_tensors import (
    TensorSpec,
    text_encoder_tensors,
    transformer_tensors,
    vae_tensors,
)
from fluxcore.weights.random_tokenizer import write_tokenizer

STEPS = 4
GRAPHED_CALLS = 8
PROMPT = "a lighthouse on a cliff above a stormy sea, oil painting"
FINDINGS: dict[str, Any] = {}
DEVICE = torch.device("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--preset", default="4b")
    parser.add_argument("--out", type=Path, help="directory for profiles and findings.json")
    parser.add_argument("--only", nargs="+", help="phases, in this order; all when left out")
    parser.add_argument("--shallow", action="store_true", help="one block of each kind")
    args = parser.parse_args()
    bench = Bench(args)
    names = args.only or [name for name in vars(Bench) if name.startswith("phase_")]
    for name in names:
        with phase(name):
            getattr(bench, name if name.startswith("phase_") else f"phase_{name}")()
        if args.out is not None:
            (args.out / "findings.json").write_text(json.dumps(FINDINGS, indent=1))
    print(json.dumps(FINDINGS))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Print how long a phase took; what goes wrong in it ends it and nothing else."""
    started = time.perf_counter()
    print(f"== {name}", flush=True)
    try:
        with torch.inference_mode():
            yield
    except Exception:  # noqa: BLE001
        traceback.print_exc(file=sys.stdout)
    print(f"== {name}: {time.perf_counter() - started:.1f} s", flush=True)


class Bench:
    """The model, the ways of running it, and one method for each phase, in order."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.sizes: list[int] = args.sizes
        self.runs: int = args.runs
        self.out: Path | None = args.out
        started = time.perf_counter()
        self.runtime = choose_runtime("cuda", kernels="fused")
        # As the files have it, and as fluxd's own kernels read it.
        self.plain = random_components(args.preset, self.runtime, shallow=args.shallow)
        arranged = {
            name: copy.deepcopy(getattr(self.plain, name)) for name in ("transformer", "vae")
        }
        self.runtime.arrange(self.plain.text_encoder, **arranged)
        self.components = replace(self.plain, **arranged)
        torch.cuda.synchronize()
        print(json.dumps(self.runtime.describe()))
        print(f"model drawn in {time.perf_counter() - started:.1f} s", flush=True)
        self.latents: dict[str, dict[int, Tensor]] = {}

    def pipeline(self, *, graphs: bool, **parts: nn.Module) -> FluxPipeline:
        """The model with fluxd's own kernels."""
        runtime = choose_runtime("cuda", kernels="fused", cuda_graphs=24 if graphs else 0)
        return FluxPipeline(replace(self.components, **parts), runtime, 2**28)

    def rebuilt(self, runtime: Runtime, dtype: torch.dtype | None = None) -> FluxPipeline:
        """The model with the functions of another runtime; compiled, where that compiles."""
        parts = {
            name: copy.deepcopy(getattr(self.plain, name)).to(dtype)
            for name in ("text_encoder", "transformer", "vae")
        }
        for network in parts.values():
            rebuild(network, runtime)
        return FluxPipeline(replace(self.components, **parts), runtime, 2**28)

    @cached_property
    def compiled(self) -> FluxPipeline:
        return self.rebuilt(replace(choose_runtime("cuda", kernels="fused"), compiles=True))

    def phase_floor(self) -> None:
        """What the chip does at the model's own shapes, one product after the other."""
        transformer = self.components.config.transformer
        width, mlp, head = transformer.width, transformer.mlp_width, transformer.head_width
        for size in self.sizes:
            image = (size // 16) ** 2
            joint = image + TEXT_TOKENS
            shapes = [
                (rows, *sides, 5)
                for rows in (image, TEXT_TOKENS)
                for sides in ((3 * width, width), (width, width), (2 * mlp, width), (width, mlp))
            ]
            shapes += [
                (joint, 3 * width + 2 * mlp, width, 20),
                (joint, width, width + mlp, 19),
                (image, width, width + mlp, 1),
            ]
            total: dict[str, float] = {"bf16": 0.0, "fp8": 0.0}
            for rows, n, k, count in shapes:
                x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
                weight = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
                total["bf16"] += count * device_ms(F.linear, x, weight)
                small, small_scale = FP8.round_rows(x)
                large, large_scale = FP8.round_rows(weight)
                scales = (small_scale, large_scale.t().contiguous())
                of_fp8 = device_ms(FP8.product, small, scales[0], large, scales[1], torch.bfloat16)
                assert FP8.unscaled is not None
                total["fp8"] += count * min(of_fp8, device_ms(FP8.unscaled, small, large))
            q, k, v = torch.randn(3, 1, width // head, joint, head, device=DEVICE).bfloat16()
            attention = {"cudnn": device_ms(cudnn_attention, q, k, v, None)}
            attention["default"] = device_ms(plain_attention, q, k, v, None)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                attention["flash"] = device_ms(plain_attention, q, k, v, None)
            best = min(attention.values())
            floors = {name: STEPS * (ms + 25 * best) for name, ms in total.items()}
            told = {"products": total, "attention": attention, "denoise_floor": floors}
            found("floor", size, told)

    def phase_plain(self) -> None:
        """Nothing but PyTorch: what the other forms are compared with."""
        self._measure("plain", self.rebuilt(choose_runtime("cuda", kernels="plain")), 3)

    def phase_fused(self) -> None:
        self._measure("fused", self.pipeline(graphs=False), 3)
        self._distance("plain", "fused")

    def phase_fused_graphs(self) -> None:
        self._measure("fused+graphs", self.pipeline(graphs=True), self.runs)
        self._same("fused", "fused+graphs")

    def phase_one_pass(self) -> None:
        """Every product in the library, one kernel for each pass; the VAE upsamples pixels."""
        pipe = self.pipeline(graphs=True, transformer=self.plain.transformer, vae=self.plain.vae)
        self._measure("products apart+graphs", pipe, self.runs)
        self._distance("plain", "products apart+graphs")

    def phase_profile(self) -> None:
        """Which kernels a picture is made of."""
        pipe = self.pipeline(graphs=True)
        for size in (self.sizes[0], self.sizes[-1]):
            self._profile(pipe, f"bf16-{size}", size)

    def phase_fp8(self) -> None:
        transformer = copy.deepcopy(self.plain.transformer)
        encoder = copy.deepcopy(self.plain.text_encoder)
        blocks = (*transformer.double_blocks, *transformer.single_blocks, *encoder.layers)
        quantise(blocks, self.runtime.eight_bits("fp8"))
        self.runtime.arrange(encoder, transformer, copy.deepcopy(self.plain.vae))
        pipe = self.pipeline(graphs=True, transformer=transformer, text_encoder=encoder)
        self._measure("fp8+graphs", pipe, self.runs)
        self._distance("plain", "fp8+graphs")
        for size in (self.sizes[0], self.sizes[-1]):
            self._profile(pipe, f"fp8-{size}", size)

    def phase_exact(self) -> None:
        """float32 for the first size: what bf16 and fp8 lose."""
        pipe = self.rebuilt(choose_runtime("cuda", "float32"), torch.float32)
        self._measure("float32", pipe, 1, self.sizes[:1])
        for name in ("plain", "fused+graphs", "fp8+graphs"):
            self._distance("float32", name)

    def phase_compiled(self) -> None:
        self._measure("compiled", self.compiled, 3)

    def phase_compiled_graphs(self) -> None:
        graphs = choose_runtime("cuda", cuda_graphs=24).graphs
        runtime = replace(self.compiled.runtime, graphs=graphs)
        parts = {n: getattr(self.compiled, n) for n in ("text_encoder", "transformer", "vae")}
        pipe = FluxPipeline(replace(self.components, **parts), runtime, 2**28)
        self._measure("compiled+graphs", pipe, self.runs)
        self._same("compiled", "compiled+graphs")
        self._distance("plain", "compiled+graphs")

    def phase_batch(self) -> None:
        """One step of several pictures of a size at once, in ms a picture."""
        transformer = self.components.transformer
        config, dtype = transformer.config, torch.bfloat16
        tables = RopeTables(config, DEVICE, torch.float64)
        modulation = transformer.modulation(torch.tensor([0.9], device=DEVICE))[0]
        for size in self.sizes:
            side = size // 16
            pe = tables.get((side, side), ())
            told = {}
            for count in (1, 2, 4):
                img = torch.randn(count, side**2, config.in_channels, device=DEVICE, dtype=dtype)
                txt = torch.randn(count, TEXT_TOKENS, config.width, device=DEVICE, dtype=dtype)
                ms = device_ms(transformer, img, txt, modulation, pe, side**2)
                told[f"of {count}"] = ms / count
            found("batch", size, told)

    def phase_decoder_attention(self) -> None:
        """The VAE's attention, whose head is wider than fast kernels take."""
        for size in self.sizes:
            q, k, v = torch.randn(3, 1, 1, (size // 8) ** 2, 512, device=DEVICE).bfloat16()
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                ms = {"efficient": device_ms(plain_attention, q, k, v, None)}
            ms["scored"] = device_ms(scored_attention, q, k, v)
            found("decoder attention", size, ms)

    def phase_host(self) -> None:
        """What the host does for each picture."""
        for size in self.sizes:
            grid = (size // 16, size // 16)
            picture = torch.randint(0, 255, (size, size, 3), device=DEVICE, dtype=torch.uint8)
            found(
                "host",
                size,
                {
                    "noise": wall_ms(draw_noise, 0, 128, grid),
                    "copy, pinned": wall_ms(self.runtime.to_host, picture),
                    "copy, pageable": wall_ms(Tensor.cpu, picture),
                },
            )

    def _measure(
        self, name: str, pipe: FluxPipeline, runs: int, sizes: list[int] | None = None
    ) -> None:
        """Stage times of whole pictures, the prompt being new each time."""
        self.latents[name] = {}
        for size in sizes or self.sizes:
            params = GenerationParams(prompt=PROMPT, width=size, height=size, steps=STEPS, seed=1)

            def draw(params: GenerationParams = params, size: int = size) -> dict[str, float]:
                pipe.conditioning_cache.clear()

                def keep(step: Any, _: int) -> None:
                    self.latents[name][size] = step.latents

                started = time.perf_counter()
                times = pipe.generate(params, keep).timings
                return {**times, "wall": (time.perf_counter() - started) * 1000}

            torch.cuda.reset_peak_memory_stats()
            first, second = draw(), draw()
            counted = [draw() for _ in range(runs)]
            told = {stage: statistics.median(t[stage] for t in counted) for stage in first}
            spread = max(t["wall"] for t in counted) - min(t["wall"] for t in counted)
            told |= {"spread": spread, "first": first["wall"], "second": second["wall"]}
            told["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found(name, size, told)

    def _same(self, one: str, other: str) -> None:
        for size, latents in self.latents.get(one, {}).items():
            equal = torch.equal(latents, self.latents[other][size])
            found(f"{other} equals {one}", size, {"bit for bit": float(equal)})

    def _distance(self, one: str, other: str) -> None:
        for size, latents in self.latents.get(one, {}).items():
            a, b = latents.double(), self.latents[other][size].double()
            distance = float((a - b).norm() / a.norm())
            found(f"{other} against {one}", size, {"latents, relative": distance})

    def _profile(self, pipe: FluxPipeline, name: str, size: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        params = GenerationParams(prompt=PROMPT, width=size, height=size, steps=STEPS, seed=1)
        pipe.generate(params)
        pipe.conditioning_cache.clear()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            pipe.generate(params)
        table = profiler.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=110
        )
        found(f"idle, {name}", size, idle_ms(profiler))
        if self.out is not None:
            (self.out / f"profile-{name}.txt").write_text(table)


def random_components(preset: str, runtime: Runtime, *, shallow: bool) -> Components:
    """A model of random weights, distributed as in ``random-checkpoint``, on the GPU."""
    model = architecture.PRESETS[preset]
    if shallow:
        shape = replace(model.transformer, num_layers=1, num_single_layers=1)
        model = replace(model, transformer=shape)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        ids = write_tokenizer(directory / "tokenizer")
        files = {
            "model_index.json": architecture.model_index(is_distilled=True),
            "scheduler/scheduler_config.json": architecture.scheduler_config(),
            "transformer/config.json": architecture.transformer_config(model),
            "text_encoder/config.json": architecture.text_encoder_config(
                model,
                dtype="bfloat16",
                bos_token_id=ids.pad_token_id,
                eos_token_id=ids.end_token_id,
            ),
            "vae/config.json": architecture.vae_config(model),
        }
        for file, content in files.items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_text(json.dumps(content))
        config = read_checkpoint_config(directory)
        tokenizer = PromptTokenizer(directory / "tokenizer")
    kernels = runtime.kernels()
    networks = {
        "text_encoder": filled(
            lambda: Qwen3Encoder(config.text_encoder, kernels),
            config.text_encoder,
            text_encoder_tensors(model),
            runtime.dtypes.weights,
        ),
        "transformer": filled(
            lambda: Flux2Transformer(config.transformer, kernels),
            config.transformer,
            transformer_tensors(model),
            runtime.dtypes.weights,
        ),
        "vae": filled(
            lambda: AutoEncoder(config.vae, kernels),
            config.vae,
            vae_tensors(model),
            runtime.dtypes.vae,
        ),
    }
    return Components(_info(preset, config), config, tokenizer, stream=None, **networks)


def filled(
    build: Callable[[], nn.Module], config: Any, specs: list[TensorSpec], dtype: torch.dtype
) -> nn.Module:
    """A network with random values in place of each published tensor."""
    by_name = {spec.name: spec for spec in specs}
    generator = torch.Generator(DEVICE).manual_seed(0)

    def drawn(source: Any) -> Tensor:
        spec = by_name[source.name]
        std = spec.std.to(DEVICE) if isinstance(spec.std, Tensor) else spec.std
        values = torch.randn(spec.shape, device=DEVICE, generator=generator)
        values = (values * std + spec.mean).to(dtype)
        last = values.dim() == 4
        return values.contiguous(memory_format=torch.channels_last) if last else values

    with torch.device("meta"):
        network = build().eval().requires_grad_(False)
    values = {
        name: drawn(sources[0]) if len(sources) == 1 else torch.cat([drawn(s) for s in sources])
        for name, sources in weight_plan(config).parts.items()
    }
    network.load_state_dict(values, assign=True)
    return network.requires_grad_(False)


def rebuild(network: nn.Module, runtime: Runtime) -> None:
    """Give a copied network the functions of another runtime."""
    kernels = runtime.kernels()
    for module in network.modules():
        attentions = {
            "vae": kernels.vae_attention,
            "qwen3": kernels.prompt_attention or kernels.attention,
        }
        owner = type(module).__module__.rpartition(".")[2]
        functions = {
            "attention": attentions.get(owner, kernels.attention),
            "gated": kernels.gated,
            "add_gated": kernels.add_gated,
            "modulated": kernels.modulated or flux2.modulated,
            "joint_heads": kernels.joint_heads or flux2.joint_heads,
            "grouped_heads": kernels.grouped_heads or qwen3.grouped_heads,
            "projected": kernels.projected or qwen3.projected,
            "normed": kernels.normed or vae.normed,
            "run": kernels.residual_block or vae.residual_block,
        }
        for name, function in functions.items():
            if not isinstance(getattr(module, name, nn.Module()), nn.Module | None):
                setattr(module, name, function)
        if hasattr(module, "kernels"):
            module.kernels = kernels


def _info(preset: str, config: CheckpointConfig) -> ModelInfo:
    return ModelInfo(
        name=f"random-{preset}",
        path=config.directory,
        is_bundled=False,
        is_distilled=True,
        default_side_px=512,
        default_steps=STEPS,
        default_guidance=None,
        parameters={},
        weight_bytes=0,
        load=(),
    )


def device_ms(work: Callable[..., Any], *args: Any) -> float:
    """Median time on the device, in ms, without what launching takes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(GRAPHED_CALLS):
            work(*args)
    times = []
    for _ in range(7):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) / GRAPHED_CALLS)
    return statistics.median(times)


def idle_ms(profiler: Any) -> dict[str, float]:
    """How long the GPU stood still between the first and the last kernel, by length of the gap."""
    events = profiler.profiler.kineto_results.events()
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    told = {"busy": 0.0, "under 5 us": 0.0, "under 50 us": 0.0, "longer": 0.0, "longest": 0.0}
    last = spans[0][0]
    for start, end in spans:
        gap = max(0, start - last) / 1e6
        told["under 5 us" if gap < 0.005 else "under 50 us" if gap < 0.05 else "longer"] += gap
        told["longest"] = max(told["longest"], gap)
        told["busy"] += max(0, end - max(start, last)) / 1e6
        last = max(last, end)
    return {**told, "kernels": float(len(spans))}


def wall_ms(work: Callable[..., Any], *args: Any) -> float:
    """Median time on the host, in ms."""
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work(*args)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def found(name: str, size: int, told: dict[str, Any]) -> None:
    """Print one finding and keep it."""
    FINDINGS.setdefault(name, {})[str(size)] = told

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} {shown(v)}" for k, v in value.items()) + "}"
        return f"{value:.4g}"

    print(
        f"{name:28}{size:6}  " + "  ".join(f"{k} {shown(v)}" for k, v in told.items()), flush=True
    )


if __name__ == "__main__":
    main()
