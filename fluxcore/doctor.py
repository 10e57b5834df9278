"""Whether a machine computes what it should: checks of its own, one finding each.

Owns what is looked at, how far a device may differ from exact arithmetic, and what to do
where it does. Meant for devices that this project cannot try itself, Apple's first; runs
on any. Each expected value is computed on the processor by the formula, never by the
function that is looked at.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxcore.bundled import KNOWN_PICTURE, KNOWN_PROMPT, KNOWN_SEED, bundled_model
from fluxcore.config import CheckpointConfig, read_checkpoint_config
from fluxcore.errors import FluxError, OutOfMemoryError
from fluxcore.params import GenerationParams
from fluxcore.pipeline import FluxPipeline
from fluxcore.pipeline.residency import memory_needs
from fluxcore.runtime import Runtime, choose_residency, choose_runtime, host_available_bytes
from fluxcore.runtime.memory import is_out_of_memory
from fluxcore.weights.random_checkpoint import write_random_checkpoint

EXACT = 1e-3
"""Relative error allowed where the device computes in float32; CUDA's convolutions use TF32."""
ROUNDED = 0.05
"""And where it computes in 16 bits."""
PICTURE_DISTANCE = 1.5
"""Mean difference of 255; 0.28 was measured in bfloat16, 3.6 with the next seed."""

OLDEST_TORCH_ON_MACS = (2, 14)
OLDEST_MACOS = 14
HARMFUL_VARIABLES = {
    "PYTORCH_ENABLE_MPS_FALLBACK": "operators that Metal lacks run on the processor, unnoticed",
    "PYTORCH_MPS_PREFER_METAL": "matrix products may come out wrong",
}
UPGRADE = "install a newer PyTorch (make install); if it stays so, report it with the block below"
REPORT = "report it with the block below"


class Status(StrEnum):
    """How a finding is to be taken."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do where that is not good."""

    status: Status
    detail: str
    remedy: str = ""


Check = Callable[[], Finding]


def checks(device: str, model: Path | None) -> Iterator[tuple[str, Check]]:
    """All checks by name, in order; each is to be run before the next is asked for.

    Args:
        device: auto, cpu, mps, cuda or cuda:N.
        model: checkpoint whose memory is to be estimated; None for the bundled one.

    Raises:
        DeviceUnavailableError: there is no such device.
        CheckpointError: there is no such checkpoint; that is no fault of the machine.
    """
    runtime = choose_runtime(device)
    config = read_checkpoint_config(bundled_model() if model is None else model)
    yield "versions", lambda: versions(runtime)
    yield "environment", environment
    yield "memory", lambda: memory(runtime, config)
    yield "matrix products", lambda: matrix_rate(runtime)
    yield "attention", lambda: attention(runtime)
    yield "attention, permuted", lambda: permuted_attention(runtime)
    yield "attention, causal", lambda: causal_attention(runtime)
    yield "attention of the VAE", lambda: vae_attention(runtime)
    with tempfile.TemporaryDirectory() as place:
        tiny = write_random_checkpoint(Path(place) / "tiny")
        for dtype in dict.fromkeys(("float32", "float16", runtime.dtypes.name)):
            yield f"tiny model, {dtype}", partial(tiny_model, tiny, device, dtype)
    yield "known picture", lambda: known_picture(device)


def guarded(check: Check) -> Finding:
    """Run a check; one that fails is a finding, too."""
    try:
        return check()
    except (FluxError, RuntimeError, MemoryError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
            return Finding(Status.FAULT, f"out of memory: {error}", "close other programs")
        return Finding(Status.FAULT, f"{type(error).__name__}: {error}", REPORT)


def versions(runtime: Runtime) -> Finding:
    """Python, PyTorch, system and chip, and what of them is known to be bad."""
    told = runtime.describe()
    shown = ", ".join(f"{name} {told[name]}" for name in ("system", "torch", "python"))
    detail = f"{told['chip']} ({told['device']}, {told['dtype']}), {shown}"
    if platform.system() != "Darwin":
        return Finding(Status.OK, detail)
    if platform.machine() != "arm64":
        remedy = "install Python for Apple silicon: this one is translated, and sees no GPU"
        return Finding(Status.FAULT, detail, remedy)
    if int(platform.mac_ver()[0].partition(".")[0]) < OLDEST_MACOS:
        return Finding(Status.FAULT, detail, f"update macOS to {OLDEST_MACOS} or newer")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH_ON_MACS:
        return Finding(Status.WARNING, detail, "install PyTorch 2.14 or newer: make install")
    if runtime.kind != "mps":
        return Finding(Status.WARNING, detail, "the GPU is not used: --device mps says why")
    return Finding(Status.OK, detail)


def environment() -> Finding:
    """Variables that make PyTorch hide faults on a Mac."""
    found = [name for name in HARMFUL_VARIABLES if os.environ.get(name, "0") != "0"]
    if not found:
        return Finding(Status.OK, "no harmful variable is set")
    told = "; ".join(f"{name}: {HARMFUL_VARIABLES[name]}" for name in found)
    return Finding(Status.WARNING, told, f"unset {' '.join(found)}")


def memory(runtime: Runtime, config: CheckpointConfig) -> Finding:
    """What is free, and how much of the model stays on the device with that."""
    side_px = min(config.vae.sample_side_px, 512)
    found = runtime.available_bytes()
    choice = choose_residency("auto", memory_needs(config, runtime, side_px), found)
    host = f"host {host_available_bytes() / 1e9:.1f} GB free"
    held = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in runtime.memory_bytes().items())
    detail = f"{choice.reason}; {host}; held in GB: {held}"
    if choice.is_tight:
        return Finding(Status.WARNING, detail, "close other programs to have all weights stay")
    return Finding(Status.OK, detail)


def matrix_rate(runtime: Runtime) -> Finding:
    """A product of the model's kind, checked and timed."""
    side = 1024 if runtime.kind == "cpu" else 4096
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator) for _ in range(2))
    dtype, device = runtime.dtypes.weights, runtime.device
    on_device = [x.to(dtype).to(device) for x in (a, b)]
    product = F.linear(*on_device)
    rows = on_device[0][:8].cpu().double() @ on_device[1].cpu().double().T
    error = _relative(product[:8], rows)
    runtime.synchronize()
    began, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - began < 0.5:
        F.linear(*on_device)
        runtime.synchronize()
        count += 1
    rate = 2 * side**3 * count / (time.perf_counter() - began) / 1e12
    return _judged(error, ROUNDED, f", {rate:.2f} TFLOP/s in {runtime.dtypes.name}")


def attention(runtime: Runtime) -> Finding:
    """fluxd's own attention on this device: views, grouped heads, a mask."""
    q, k, v = _heads(8, 300), _heads(2, 300, 1), _heads(2, 300, 2)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    device, attend = runtime.device, runtime.kernels().attention
    found = attend(q.to(device), k.to(device), v.to(device), mask.to(device))
    return _judged(_relative(found, _exact_attention(q, k, v, mask)), EXACT)


def permuted_attention(runtime: Runtime) -> Finding:
    """PyTorch's attention of views, which has been wrong on Metal; fluxd makes copies there."""
    q, k, v = (_heads(4, 300, seed) for seed in range(3))
    device = runtime.device
    found = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device))
    return _of_torch(_relative(found, _exact_attention(q, k, v, None)), runtime)


def causal_attention(runtime: Runtime) -> Finding:
    """PyTorch's causal attention, which has seen later tokens; fluxd gives masks instead."""
    q, k, v = (_heads(4, 300, seed).contiguous() for seed in range(3))
    device = runtime.device
    found = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), is_causal=True)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    return _of_torch(_relative(found, _exact_attention(q, k, v, mask)), runtime)


def vae_attention(runtime: Runtime) -> Finding:
    """One head of 512 channels, more rows than one chunk."""
    q, k, v = (_heads(1, 2500, seed, width=512) for seed in range(3))
    device, attend = runtime.device, runtime.kernels().vae_attention
    found = attend(q.to(device), k.to(device), v.to(device), None)
    return _judged(_relative(found, _exact_attention(q, k, v, None)), EXACT)


def tiny_model(checkpoint: Path, device: str, dtype: str) -> Finding:
    """A random model with every part of the real one: the device against the processor."""
    params = GenerationParams(
        prompt="a red fox",
        width=96,
        height=64,
        steps=2,
        seed=5,
        references=(Image.linear_gradient("L").resize((64, 64)),),
    )
    exact = _latents(FluxPipeline.load(checkpoint, device="cpu", dtype="float32"), params)
    found = _latents(FluxPipeline.load(checkpoint, device=device, dtype=dtype), params)
    return _judged(_relative(found, exact), EXACT if dtype == "float32" else ROUNDED)


def known_picture(device: str) -> Finding:
    """The bundled model draws the picture that it is known to draw."""
    pipe = FluxPipeline.load(device=device)
    pipe.warm_up()
    result = pipe.generate(GenerationParams(prompt=KNOWN_PROMPT, seed=KNOWN_SEED))
    with Image.open(KNOWN_PICTURE) as known:
        expected = np.asarray(known.convert("RGB"), dtype=float)
    distance = float(np.abs(np.asarray(result.images[0], dtype=float) - expected).mean())
    times = ", ".join(f"{stage} {spent:.0f} ms" for stage, spent in result.timings.items())
    detail = f"mean difference {distance:.2f} of 255; {times}"
    if distance <= PICTURE_DISTANCE:
        return Finding(Status.OK, detail)
    return Finding(Status.FAULT, detail, UPGRADE)


def _heads(heads: int, tokens: int, seed: int = 0, width: int = 128) -> Tensor:
    """Random [1, H, L, K], a view of [1, L, H, K] as projections give it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, width, generator=generator).transpose(1, 2)


def _exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(K)) v in float64, by its formula."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def _latents(pipe: FluxPipeline, params: GenerationParams) -> Tensor:
    last: list[Tensor] = []
    pipe.generate(params, on_step=lambda step, _: last.append(step.latents))
    return last[-1]


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).norm() / expected.norm())


def _judged(error: float, bound: float, more: str = "") -> Finding:
    detail = f"relative error {error:.1e}, at most {bound:g} expected{more}"
    # Not "error > bound": a NaN must not pass.
    return Finding(Status.OK, detail) if error <= bound else Finding(Status.FAULT, detail, UPGRADE)


def _of_torch(error: float, runtime: Runtime) -> Finding:
    """fluxd works around these on Metal; elsewhere it relies on them."""
    finding = _judged(error, EXACT)
    if finding.status is Status.OK or runtime.kind != "mps":
        return finding
    remedy = "fluxd does not depend on it; a newer PyTorch may have it right"
    return Finding(Status.WARNING, finding.detail, remedy)
