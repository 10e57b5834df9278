"""The tiny model on this machine's GPU (CUDA or MPS) against the same on its CPU.

``TEST_DEVICE`` names another device, ``cpu`` among them, to try the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import OutOfMemoryError
from fluxcore.kernels import plain_attention
from fluxcore.models.qwen3 import causal_mask
from fluxcore.pipeline import residency
from fluxcore.runtime import WAYS, translated_errors
from fluxcore.runtime.attention import chunked_attention

pytestmark = pytest.mark.device

PICTURE = Image.effect_noise((96, 80), 60).convert("RGB")
MASK = Image.linear_gradient("L").resize(PICTURE.size)
REQUESTS = {
    "text": GenerationParams(prompt="a red fox", width=128, height=96, steps=3, seed=5),
    "references": GenerationParams(prompt="the same", references=(PICTURE, PICTURE), seed=6),
    "inpaint": GenerationParams(prompt="a star", references=(PICTURE,), mask=MASK, seed=7),
}


@pytest.fixture(scope="module")
def device() -> str:
    named = os.environ.get("TEST_DEVICE")
    if named:
        return named
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    pytest.skip("no CUDA or MPS device on this machine")


@pytest.fixture(scope="module")
def on_gpu(device: str, tiny_checkpoint: Path) -> FluxPipeline:
    return FluxPipeline.load(tiny_checkpoint, device=device, dtype="float32")


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def _drawn(pipe: FluxPipeline, params: GenerationParams) -> tuple[Tensor, np.ndarray]:
    last: dict[str, Tensor] = {}
    result = pipe.generate(params, on_step=lambda step, _: last.update(latents=step.latents))
    return last["latents"], np.asarray(result.images[0]).astype(int)


@pytest.mark.parametrize("name", REQUESTS)
def test_float32_pictures_agree(
    name: str, on_gpu: FluxPipeline, tiny_pipeline: FluxPipeline
) -> None:
    latents, picture = _drawn(on_gpu, REQUESTS[name])
    exact_latents, exact = _drawn(tiny_pipeline, REQUESTS[name])
    # Bounds by design, not measured on a GPU yet: only convolutions use TF32 (CUDA).
    assert _relative(latents, exact_latents) < 1e-3
    assert np.abs(picture - exact).mean() < 0.5


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_every_dtype_draws_the_same_picture(
    dtype: str, device: str, tiny_checkpoint: Path, tiny_pipeline: FluxPipeline
) -> None:
    pipe = FluxPipeline.load(tiny_checkpoint, device=device, dtype=dtype)
    latents, _ = _drawn(pipe, REQUESTS["text"])
    exact, _ = _drawn(tiny_pipeline, REQUESTS["text"])
    assert _relative(latents, exact) < 0.05


def test_the_same_seed_gives_the_same_bytes(on_gpu: FluxPipeline) -> None:
    pictures = [on_gpu.generate(REQUESTS["text"]).images[0].tobytes() for _ in range(3)]
    assert len(set(pictures)) == 1


@pytest.mark.parametrize("host_bytes", [2**40, 0], ids=["kept on the host", "read each time"])
def test_every_residency_draws_the_same_bytes(
    device: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, host_bytes: int
) -> None:
    monkeypatch.setattr(residency, "host_available_bytes", lambda: host_bytes)
    pictures = set()
    for way in WAYS:
        pipe = FluxPipeline.load(tiny_checkpoint, device=device, residency=way)
        drawn = [pipe.generate(REQUESTS[name]).images[0].tobytes() for name in REQUESTS]
        pictures.add(tuple(drawn))
    assert len(pictures) == 1


def test_attention_of_views_and_of_masks_is_right(on_gpu: FluxPipeline) -> None:
    """Permuted inputs and causal masks have been wrong on MPS before."""
    device, attention = on_gpu.runtime.device, on_gpu.runtime.kernels().attention
    q = torch.randn(1, 40, 4, 32).transpose(1, 2)  # [B, H, L, K], a view
    k, v = (torch.randn(1, 40, 2, 32).transpose(1, 2) for _ in range(2))
    mask = causal_mask(40, torch.tensor([31]))
    exact = plain_attention(q, k, v, mask)
    assert _relative(attention(*(x.to(device) for x in (q, k, v, mask))), exact) < 1e-4
    exact = plain_attention(q, q, q, None)
    assert _relative(attention(*(q.to(device) for _ in range(3)), None), exact) < 1e-4


def test_attention_of_wide_heads_is_right_in_chunks(on_gpu: FluxPipeline) -> None:
    q, k, v = (torch.randn(1, 1, 2500, 512) for _ in range(3))
    found = chunked_attention(*(x.to(on_gpu.runtime.device) for x in (q, k, v)), None)
    assert _relative(found, plain_attention(q, k, v, None)) < 1e-4


def test_the_next_job_works_after_one_that_did_not_fit(on_gpu: FluxPipeline) -> None:
    def overreach() -> None:
        with translated_errors():
            torch.empty(2**50, dtype=torch.uint8, device=on_gpu.runtime.device)

    with pytest.raises(OutOfMemoryError, match="smaller size"):
        overreach()
    on_gpu.runtime.release_memory()
    assert on_gpu.generate(REQUESTS["text"]).images
