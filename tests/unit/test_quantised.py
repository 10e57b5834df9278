"""Eight bits: rounding, products beside their plain form, and what is replaced in a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import DeviceUnavailableError
from fluxcore.runtime.quantised import (
    INT8,
    PLAIN_FP8,
    PLAIN_INT8,
    EightBitLinear,
    EightBits,
    check_precision,
    give_no_workspace,
    quantise,
)

needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="this processor does not multiply in int8"
)
PLAIN = pytest.mark.parametrize("format", [PLAIN_FP8, PLAIN_INT8], ids=["fp8", "int8"])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@PLAIN
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_rows_are_scaled_to_the_format_s_range(format: EightBits, magnitude: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 256, generator=generator) * magnitude).bfloat16()
    x[3] *= 1000  # a row of its own scale does not spoil the others
    rounded, scale = format.round_rows(x)
    assert rounded.dtype == format.dtype
    assert scale.shape == (40, 1)
    assert torch.equal(rounded.float().abs().amax(dim=-1), torch.full((40,), format.largest))
    for row in range(40):
        # measured: fp8 0.026, half of the 1/8 between neighbours, spread evenly; int8 0.007
        assert relative(rounded[row].float() * scale[row], x[row]) < 0.04


def test_a_product_without_scales_is_that_with_scales_of_one() -> None:
    torch.manual_seed(0)
    (x, _), (weight, _) = (PLAIN_FP8.round_rows(torch.randn(8, 32)) for _ in "ab")
    one = torch.ones(1, 1)
    assert PLAIN_FP8.unscaled is not None
    expected = PLAIN_FP8.product(x, one, weight, one, torch.bfloat16)
    assert torch.equal(PLAIN_FP8.unscaled(x, weight), expected)


def test_memory_of_the_library_s_own_is_left_to_who_set_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "CUBLASLT_WORKSPACE_SIZE"
    monkeypatch.setenv(name, "4096")
    give_no_workspace()
    assert os.environ[name] == "4096"
    monkeypatch.delenv(name)
    give_no_workspace()
    assert os.environ[name] == "0"


@PLAIN
def test_a_row_of_zeros_stays_zero(format: EightBits) -> None:
    rounded, scale = format.round_rows(torch.zeros(2, 16))
    assert torch.equal(rounded.float() * scale, torch.zeros(2, 16))


@PLAIN
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 5, 64), (1, 64), (2, 3, 64)])
def test_a_layer_multiplies_nearly_as_before(
    format: EightBits, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).to(dtype).requires_grad_(False)
    x = torch.randn(shape).to(dtype)
    found = EightBitLinear(linear, format)(x)
    assert found.dtype == dtype
    assert found.shape == (*x.shape[:-1], 48)
    assert relative(found, linear(x)) < 0.06  # measured: fp8 0.037, int8 0.008


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 16), (7, 48, 80), (300, 2064, 512)])
def test_int8_products_of_the_cpu_are_those_of_the_plain_form(
    rows: int, n: int, k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=False).to(dtype).requires_grad_(False)
    x = (torch.randn(rows, k) * 30).to(dtype)
    found, expected = EightBitLinear(linear, INT8)(x), EightBitLinear(linear, PLAIN_INT8)(x)
    assert found.dtype == dtype
    # The sums are the same whole numbers: bfloat16 rounds before the row's scale, and after.
    assert relative(found, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-6)


@needs_vnni
def test_int8_takes_the_largest_values_without_overflow() -> None:
    """Unsigned times signed bytes overflow in instructions that add two products in 16 bits."""
    ones = torch.ones(4, 4096)
    for sign in (1, -1):
        rows, scale = INT8.round_rows(sign * ones)
        weight, weight_scale = INT8.round_rows(ones[:16].expand(4, -1).repeat(4, 1))
        args = (rows, scale, INT8.pack(weight), weight_scale.t().contiguous())
        product = INT8.product(*args, torch.float32)
        assert torch.allclose(product, sign * torch.full((4, 16), 4096.0))


@PLAIN
def test_only_matrices_of_sides_that_the_hardware_takes_are_replaced(format: EightBits) -> None:
    block = nn.ModuleDict(
        {
            "fits": nn.Linear(32, 64, bias=False),
            "inner": nn.Sequential(nn.Linear(64, 16, bias=False), nn.LayerNorm(16)),
            "odd": nn.Linear(32, 20, bias=False),
        }
    ).bfloat16()
    freed = quantise([block], format)
    assert isinstance(block["fits"], EightBitLinear)
    assert isinstance(block["inner"][0], EightBitLinear)  # type: ignore[index]
    assert isinstance(block["odd"], nn.Linear)
    assert freed == (32 * 64 + 64 * 16) - 4 * (64 + 16), "a byte a weight, a scale a row"


def latents(pipe: FluxPipeline) -> torch.Tensor:
    params = GenerationParams(prompt="a red fox", width=64, height=64, seed=1)
    return [step.latents for step in pipe.denoise(pipe.prepare(params))][-1]


@PLAIN
def test_a_whole_network_draws_nearly_the_same(format: EightBits, tiny_checkpoint: Path) -> None:
    pipe = FluxPipeline.load(tiny_checkpoint, device="cpu", dtype="bfloat16", kernels="plain")
    exact = latents(pipe)
    blocks = (*pipe.transformer.double_blocks, *pipe.transformer.single_blocks)
    quantise(blocks, format)
    assert not [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    found = latents(pipe)
    assert 0 < relative(found, exact) < 0.1  # measured: fp8 0.027, int8 0.012


@needs_vnni
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_loaded_in_int8_takes_less_and_draws_nearly_the_same(
    dtype: str, tiny_checkpoint: Path
) -> None:
    exact = FluxPipeline.load(tiny_checkpoint, "cpu", dtype)
    pipe = FluxPipeline.load(tiny_checkpoint, "cpu", dtype, precision="int8")
    assert pipe.runtime.describe()["precision"] == "int8"
    blocks = (*pipe.transformer.double_blocks, *pipe.transformer.single_blocks)
    placed = [p.dtype for block in blocks for p in block.parameters() if p.ndim > 1]
    assert placed.count(torch.int8) == placed.count(torch.float32) > 10  # a matrix, its scales
    assert pipe.info.weight_bytes < exact.info.weight_bytes
    assert pipe.info.parameters == exact.info.parameters
    assert 0 < relative(latents(pipe), latents(exact)) < 0.1


def test_a_precision_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, capability in (("cpu", None), ("mps", None), ("cuda", (8, 6))):
        with pytest.raises(DeviceUnavailableError, match=r"capability 8.9 or newer.*bf16"):
            check_precision("fp8", kind, torch.bfloat16, capability)
    with pytest.raises(DeviceUnavailableError, match="dtype bfloat16 or auto"):
        check_precision("fp8", "cuda", torch.float16, (9, 0))
    check_precision("fp8", "cuda", torch.bfloat16, (8, 9))
    check_precision("bf16", "mps", torch.float16, None)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    with pytest.raises(DeviceUnavailableError, match="dtype float16; leave dtype out"):
        check_precision("int8", "cpu", torch.float16, None)
    check_precision("int8", "cpu", torch.float32, None)
    for kind in ("mps", "cuda"):
        with pytest.raises(DeviceUnavailableError, match=r"needs device cpu.*bf16"):
            check_precision("int8", kind, torch.bfloat16, None)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(DeviceUnavailableError, match=r"processor with VNNI.*bf16"):
        check_precision("int8", "cpu", torch.bfloat16, None)


@needs_vnni
def test_int8_is_refused_where_it_does_not_go_along(tiny_checkpoint: Path) -> None:
    with pytest.raises(DeviceUnavailableError, match="compile to off"):
        FluxPipeline.load(tiny_checkpoint, "cpu", precision="int8", compile_networks="on")
    with pytest.raises(DeviceUnavailableError, match="residency balanced"):
        FluxPipeline.load(tiny_checkpoint, "cpu", precision="int8", residency="low")
