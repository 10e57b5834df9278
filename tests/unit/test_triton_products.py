"""Products that finish their results, against the plain form: on a GPU, or interpreted."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxcore.config import TransformerConfig
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.models import flux2
from fluxcore.models.rope import Rope
from fluxcore.runtime import Runtime, choose_runtime

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not IS_HOPPER and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1"):
    pytest.skip("neither a Hopper GPU nor TRITON_INTERPRET=1", allow_module_level=True)
from fluxcore.runtime import triton_products as products  # noqa: E402

DEVICE = torch.device("cuda" if IS_HOPPER else "cpu")
CONFIG = TransformerConfig(
    in_channels=128,
    out_channels=128,
    double_blocks=1,
    single_blocks=2,
    heads=2,
    head_width=128,
    text_width=96,
    mlp_ratio=2.0,
    rope_axes=(32, 32, 32, 32),
    rope_theta=2000.0,
    time_channels=64,
    norm_eps=1e-6,
)


@pytest.fixture(autouse=True)
def _interpreter_that_knows_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own multiplies the 16 bits of such numbers as if they were whole numbers."""
    if IS_HOPPER:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:  # newer numpy makes no index of an array of one
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        def wide(x: Any) -> Any:
            is_bits = x.dtype.scalar.is_bf16()
            return (x.data.astype("uint32") << 16).view("float32") if is_bits else x.data

        return interpreter.TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def blocks() -> tuple[list[flux2.SingleBlock], list[flux2.SingleBlock]]:
    """Two blocks in float32, and the same in bfloat16, arranged."""
    exact = []
    for number in range(2):
        block = flux2.SingleBlock(CONFIG, Kernels(plain_attention, plain_attention)).to(DEVICE)
        for place, parameter in enumerate(block.parameters()):
            shape, seed = parameter.shape, 10 * number + place
            drawn = values(*shape, seed=seed) / (shape[-1] ** 0.5 if len(shape) > 1 else 4)
            parameter.data = (drawn + (len(shape) == 1)).bfloat16().float()
        exact.append(block.requires_grad_(False))
    fused = [copy.deepcopy(block).bfloat16() for block in exact]
    for block in fused:
        products.arrange(block)
    return exact, fused


def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor, Rope]:
    angle = values(tokens, 64, seed=1).repeat_interleave(2, 1)
    sign = torch.tensor([-1.0, 1.0], device=DEVICE).repeat(64)
    x = values(batch, tokens, CONFIG.width, seed=2).bfloat16()
    mod = values(3, 1, CONFIG.width, seed=3).bfloat16() / 4 + 1
    return x, mod, (angle.cos(), angle.sin() * sign)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (1, 150), (2, 70)])
@pytest.mark.parametrize("few_rows", [2048, 0], ids=["one product", "two products"])
def test_single_blocks_are_as_near_to_float32_as_rounding_is(
    monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int, few_rows: int
) -> None:
    monkeypatch.setattr(products, "FEW_ROWS", few_rows)
    exact, fused = blocks()
    x, mod, pe = inputs(batch, tokens)
    expected = flux2.single_blocks(exact, x.float(), mod.float(), pe)
    rounded = [copy.deepcopy(block).bfloat16() for block in exact]
    plain = flux2.single_blocks(rounded, x, mod, pe)
    found = products.single_blocks(fused, x, mod, pe)
    assert found.shape == x.shape and found.dtype == x.dtype
    # The interpreter cuts digits off where a GPU rounds: measured 0.012 and 0.0046.
    most = 1.1 * apart(plain, expected) if IS_HOPPER else 0.03
    assert apart(found, expected) < most


def test_rows_of_one_picture_do_not_depend_on_those_beside_it() -> None:
    block = blocks()[1][0]
    x, _, pe = inputs(2, 70)
    width = x.shape[-1]
    turns = products.half_tables(pe)
    q, k, v, joined = products.projected(block, x, turns)
    for number in range(2):
        alone = products.projected(block, x[number : number + 1].contiguous(), turns)
        together = (q, k, v, joined[..., width:])
        for found, expected in zip(together, (*alone[:3], alone[3][..., width:]), strict=True):
            own = found[number : number + 1]
            # numpy, which multiplies where kernels are interpreted, adds up in another order.
            assert torch.equal(own, expected) if IS_HOPPER else apart(own, expected.float()) < 0.01


def test_only_what_the_tiles_divide_is_taken() -> None:
    block = blocks()[0][0]
    assert products.fits(block)
    block.sizes = (3 * 256, 2 * 384)
    assert products.fits(block)
    block.sizes = (3 * 256, 2 * 320)
    assert not products.fits(block)
    block.sizes = (3 * 256, 2 * 512)
    block.qk_norm.heads = 4
    assert not products.fits(block)


def test_a_transformer_is_arranged_where_the_kernels_were_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = choose_runtime("cpu", "float32")
    monkeypatch.setattr(Runtime, "uses_triton", True)
    for capability, residency in (((8, 9), "resident"), ((9, 0), "low"), ((10, 0), "resident")):
        transformer = flux2.Flux2Transformer(CONFIG, Kernels(plain_attention, plain_attention))
        replace(runtime, capability=capability, residency=residency).arrange(transformer)
        assert transformer.run_single is flux2.single_blocks
    before = transformer.single_blocks[0].qkv_mlp.weight.clone()
    replace(runtime, capability=(9, 0)).arrange(transformer)
    assert transformer.run_single is products.single_blocks
    after = transformer.single_blocks[0].qkv_mlp.weight
    qkv, half, gates = 768, 128, 512
    assert torch.equal(after[:qkv], before[:qkv])
    assert torch.equal(after[qkv : qkv + half], before[qkv : qkv + half])
    assert torch.equal(after[qkv + half : qkv + 2 * half], before[qkv + gates :][:half])
