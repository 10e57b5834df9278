"""fp8: rounding, the plain product, and what is replaced in a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import DeviceUnavailableError
from fluxcore.runtime.quantised import (
    FP8,
    LARGEST,
    Fp8Linear,
    check_fp8,
    plain_product,
    quantise,
    round_rows,
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_rows_are_scaled_to_the_format_s_range(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 256, generator=generator) * magnitude).bfloat16()
    x[3] *= 1000  # a row of its own scale does not spoil the others
    rounded, scale = round_rows(x)
    assert rounded.dtype == FP8
    assert scale.shape == (40, 1)
    assert torch.equal(rounded.float().abs().amax(dim=-1), torch.full((40,), LARGEST))
    for row in range(40):
        # measured: 0.026, half of the 1/8 between neighbours, spread evenly
        assert relative(rounded[row].float() * scale[row], x[row]) < 0.04


def test_a_row_of_zeros_stays_zero() -> None:
    rounded, scale = round_rows(torch.zeros(2, 16))
    assert torch.equal(rounded.float() * scale, torch.zeros(2, 16))


@pytest.mark.parametrize("shape", [(1, 5, 64), (64,), (2, 3, 64)])
def test_a_layer_multiplies_nearly_as_before(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(shape).bfloat16()
    if len(shape) == 1:
        x = x[None]
    found = Fp8Linear(linear, plain_product)(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*x.shape[:-1], 48)
    assert relative(found, linear(x)) < 0.06  # measured: 0.037


def test_only_matrices_of_sides_that_the_hardware_takes_are_replaced() -> None:
    block = nn.ModuleDict(
        {
            "fits": nn.Linear(32, 64, bias=False),
            "inner": nn.Sequential(nn.Linear(64, 16, bias=False), nn.LayerNorm(16)),
            "odd": nn.Linear(32, 20, bias=False),
        }
    ).bfloat16()
    freed = quantise([block], plain_product)
    assert isinstance(block["fits"], Fp8Linear)
    assert isinstance(block["inner"][0], Fp8Linear)  # type: ignore[index]
    assert isinstance(block["odd"], nn.Linear)
    assert freed == (32 * 64 + 64 * 16) - 4 * (64 + 16), "a byte a weight, a scale a row"


def test_a_whole_network_draws_nearly_the_same(tiny_checkpoint: Path) -> None:
    def latents(pipe: FluxPipeline) -> torch.Tensor:
        params = GenerationParams(prompt="a red fox", width=64, height=64, seed=1)
        return [step.latents for step in pipe.denoise(pipe.prepare(params))][-1]

    pipe = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    exact = latents(pipe)
    blocks = (*pipe.transformer.double_blocks, *pipe.transformer.single_blocks)
    quantise(blocks, plain_product)
    assert not [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    found = latents(pipe)
    assert 0 < relative(found, exact) < 0.1  # measured: 0.027


def test_fp8_is_refused_where_it_cannot_be() -> None:
    for kind, capability in (("cpu", None), ("mps", None), ("cuda", (8, 6))):
        with pytest.raises(DeviceUnavailableError, match="capability 8.9 or newer.*bf16"):
            check_fp8(kind, torch.bfloat16, capability)
    with pytest.raises(DeviceUnavailableError, match="dtype bfloat16 or auto"):
        check_fp8("cuda", torch.float16, (9, 0))
    check_fp8("cuda", torch.bfloat16, (8, 9))
