"""float16 with a float32 residual stream: what real activations need on M1 and M2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.kernels import swiglu, wide_linear

PARAMS = GenerationParams(prompt="a red fox", width=64, height=64, steps=2, seed=3)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_float16_draws_nearly_what_float32_draws(
    tiny_checkpoint: Path, tiny_pipeline: FluxPipeline
) -> None:
    half = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype="float16")
    assert half.encode_prompt("a fox").embeddings.dtype == torch.float32
    final: dict[str, torch.Tensor] = {}
    half.generate(PARAMS, on_step=lambda step, _: final.update(half=step.latents))
    tiny_pipeline.generate(PARAMS, on_step=lambda step, _: final.update(full=step.latents))
    # 0.0014 when this was written
    assert _relative(final["half"], final["full"]) < 0.01


def _scale(pipe: FluxPipeline, part: str) -> None:
    """Make one place of the network put out values beyond 65504; all weights stay below."""
    if part == "text encoder":
        layer = pipe.text_encoder.layers[4]
        into, out = layer.gate_up.weight, layer.down.weight
    elif part == "double block":
        stream = pipe.transformer.double_blocks[0].txt
        into, out = stream.mlp_in.weight, stream.mlp_out.weight
    else:
        block = pipe.transformer.single_blocks[0]
        into, out = block.qkv_mlp.weight[block.sizes[0] :], block.out.weight
    into.mul_(40)
    out.mul_(150)


@pytest.mark.parametrize("part", ["text encoder", "double block", "single block"])
def test_activations_beyond_float16_s_range_survive(part: str, tiny_checkpoint: Path) -> None:
    final: dict[str, torch.Tensor] = {}
    largest: list[float] = []
    for dtype in ("float32", "float16"):
        pipe = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype=dtype)
        _scale(pipe, part)
        watched = {
            "text encoder": pipe.text_encoder.layers[4].down,
            "double block": pipe.transformer.double_blocks[0].txt.mlp_out,
            "single block": pipe.transformer.single_blocks[0].out,
        }[part]
        if dtype == "float32":
            watched.register_forward_hook(lambda _, __, out: largest.append(out.abs().max().item()))
        job = pipe.prepare(PARAMS)
        with torch.inference_mode():
            *_, last = pipe.denoise(job)
        final[dtype] = last.latents
    assert max(largest) > 65_504, "the test does not reach beyond float16"
    assert torch.isfinite(final["float16"]).all()
    assert _relative(final["float16"], final["float32"]) < 0.05


def test_wide_linear_equals_the_exact_product_over_the_whole_range() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 64, bias=False).half().requires_grad_(False)
    for magnitude in (1e-2, 1.0, 1e3, 1e5, 1e7):
        x = torch.randn(4, 256) * magnitude
        exact = x.double() @ linear.weight.double().T
        assert _relative(wide_linear(x, linear), exact) < 2e-3


def test_swiglu_of_float16_leaves_its_range_unharmed() -> None:
    gate, value = torch.full((2, 4), 1000.0), torch.full((2, 4), 500.0)
    assert torch.equal(swiglu(gate.half(), value.half()), torch.full((2, 4), 500_000.0))
    assert swiglu(gate.bfloat16(), value.bfloat16()).dtype == torch.bfloat16
