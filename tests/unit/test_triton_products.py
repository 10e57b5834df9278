"""Blocks whose products finish their results, against the plain form: on a GPU, or interpreted."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fluxcore.config import Qwen3Config, TransformerConfig, VaeConfig
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.models import Qwen3Encoder, flux2
from fluxcore.models.rope import Rope
from fluxcore.models.vae import AutoEncoder
from fluxcore.runtime import Runtime, choose_runtime
from fluxcore.runtime.quantised import FP8, PLAIN_FP8, quantise
from tests.unit.interpreted import interpreter_that_knows_bfloat16

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not IS_HOPPER and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1"):
    pytest.skip("neither a Hopper GPU nor TRITON_INTERPRET=1", allow_module_level=True)
from fluxcore.runtime import triton_attention as few  # noqa: E402
from fluxcore.runtime import triton_blocks as fused_blocks  # noqa: E402
from fluxcore.runtime import triton_narrow_blocks as narrow_blocks  # noqa: E402
from fluxcore.runtime import triton_products as products  # noqa: E402
from fluxcore.runtime.triton_encoder import NarrowLayers  # noqa: E402

DEVICE = torch.device("cuda" if IS_HOPPER else "cpu")
FORMAT = FP8 if IS_HOPPER else PLAIN_FP8
CONFIG = TransformerConfig(
    in_channels=128,
    out_channels=128,
    double_blocks=2,
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
TEXT_ENCODER = Qwen3Config(
    vocabulary=50,
    width=32,
    layers=28,
    heads=2,
    kv_heads=1,
    head_width=16,
    mlp_width=32,
    norm_eps=1e-6,
    rope_theta=1e6,
)
VAE = VaeConfig(
    image_channels=3,
    latent_channels=8,
    encoder_channels=(8, 8),
    decoder_channels=(8, 8, 8),
    layers_per_block=1,
    norm_groups=4,
    mid_attention=False,
    quant_conv=False,
    post_quant_conv=False,
    batch_norm_eps=1e-4,
    sample_side_px=64,
)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if IS_HOPPER:
        yield
    else:
        yield from interpreter_that_knows_bfloat16(monkeypatch)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


TEXT = products.ROWS
"""Text rows of a picture: as many as one tile has."""


def transformers() -> tuple[flux2.Flux2Transformer, flux2.Flux2Transformer, Any]:
    """One in float32, the same in bfloat16, and that one's blocks fused."""
    exact = flux2.Flux2Transformer(CONFIG, Kernels(plain_attention, plain_attention)).to(DEVICE)
    for seed, parameter in enumerate(exact.parameters()):
        shape = parameter.shape
        drawn = values(*shape, seed=seed) / (shape[-1] ** 0.5 if len(shape) > 1 else 4)
        parameter.data = (drawn + (len(shape) == 1)).bfloat16().float()
    exact.requires_grad_(False)
    rounded = copy.deepcopy(exact).bfloat16()
    return exact, rounded, fused_blocks.FusedBlocks(copy.deepcopy(rounded))


class Inputs(NamedTuple):
    img: Tensor
    txt: Tensor
    mod: flux2.Modulation
    pe: Rope
    out_tokens: int

    def wide(self) -> Inputs:
        mod = flux2.Modulation(*(rows.float() for rows in self.mod))
        return self._replace(img=self.img.float(), txt=self.txt.float(), mod=mod)


def inputs(batch: int, tokens: int, out_tokens: int) -> Inputs:
    angle = values(TEXT + tokens, 64, seed=1).repeat_interleave(2, 1)
    sign = torch.tensor([-1.0, 1.0], device=DEVICE).repeat(64)
    img = values(batch, tokens, CONFIG.width, seed=2).bfloat16()
    txt = values(batch, TEXT, CONFIG.width, seed=4).bfloat16()
    parts = values(17, 1, CONFIG.width, seed=3).bfloat16() / 4 + 1
    mod = flux2.Modulation(*parts.split((6, 6, 3, 2)))
    return Inputs(img, txt, mod, (angle.cos(), angle.sin() * sign), out_tokens)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("few_rows", "batch", "tokens", "out"),
    [(2048, 2, 150, 90), (0, 1, 70, 70)],
    ids=["one product", "two products"],
)
def test_blocks_are_as_near_to_float32_as_rounding_is(
    monkeypatch: pytest.MonkeyPatch, few_rows: int, batch: int, tokens: int, out: int
) -> None:
    monkeypatch.setattr(fused_blocks, "FEW_ROWS", few_rows)
    exact, rounded, fused = transformers()
    given = inputs(batch, tokens, out)
    expected = exact.run_blocks(*given.wide())
    plain = rounded.run_blocks(*given)
    found = fused(*given)
    assert found.shape == (batch, out, CONFIG.width) and found.dtype == plain.dtype
    # The interpreter cuts digits off where a GPU rounds.
    most = 1.1 * apart(plain, expected) if IS_HOPPER else 0.03
    assert apart(found, expected) < most


def test_one_product_for_each_stream() -> None:
    """Rows of text and image are multiplied with weights of their own, in any number of them."""
    first, second = values(512, 128, seed=1).bfloat16(), values(512, 128, seed=2).bfloat16()
    rows = values(2, TEXT + 70, 128, seed=3).bfloat16()
    gated = torch.full((2, TEXT + 70, 256), torch.nan, device=DEVICE).bfloat16()
    products.multiply(rows, torch.cat((first, second)), gated=gated, first=TEXT)
    for weight, own in ((first, slice(0, TEXT)), (second, slice(TEXT, None))):
        gates, halves = (
            (rows[:, own].float() @ weight.float().T).unflatten(-1, (2, 2, 128)).unbind(-2)
        )
        expected = (torch.nn.functional.silu(gates) * halves).flatten(-2)
        assert apart(gated[:, own], expected) < 0.01
    alone = torch.empty_like(gated[1:])
    products.multiply(rows[1:], torch.cat((first, second)), gated=alone, first=TEXT)
    # numpy, which multiplies where kernels are interpreted, adds up in another order.
    assert torch.equal(gated[1:], alone) if IS_HOPPER else apart(gated[1:], alone.float()) < 0.01
    with pytest.raises(AssertionError, match="70 rows of the first stream"):
        products.multiply(rows, torch.cat((first, second)), gated=gated, first=70)


@pytest.mark.parametrize(
    ("changed", "is_fit"),
    [
        ({}, True),
        ({"mlp_ratio": 1.5}, True),
        ({"mlp_ratio": 1.25}, False),
        ({"heads": 4, "head_width": 64, "rope_axes": (16, 16, 16, 16)}, False),
        ({"heads": 3}, False),
    ],
)
def test_only_what_the_tiles_divide_is_taken(changed: dict[str, Any], is_fit: bool) -> None:
    kernels = Kernels(plain_attention, plain_attention)
    transformer = flux2.Flux2Transformer(replace(CONFIG, **changed), kernels)
    assert fused_blocks.fits(transformer) is is_fit


def test_networks_are_arranged_where_the_kernels_were_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = choose_runtime("cpu", "float32")
    vae = AutoEncoder(VAE, Kernels(plain_attention, plain_attention))
    encoder = Qwen3Encoder(TEXT_ENCODER, Kernels(plain_attention, plain_attention))
    runtime.arrange(encoder, None, vae)
    assert vae.decoder.levels[0].resample.fused is None
    monkeypatch.setattr(Runtime, "uses_triton", True)
    for capability, residency in (((8, 9), "resident"), ((9, 0), "low"), ((10, 0), "resident")):
        transformer = flux2.Flux2Transformer(CONFIG, Kernels(plain_attention, plain_attention))
        of_other = replace(runtime, capability=capability, residency=residency)
        of_other.arrange(encoder, transformer, vae)
        assert transformer.fused_blocks is None and encoder.fused_layers is None
    quantise(encoder.layers, FORMAT)
    single, stream = transformer.single_blocks[0], transformer.double_blocks[1].img
    before, qkv_before = single.qkv_mlp.weight.clone(), stream.qkv.weight.clone()
    mlp_before = stream.mlp_in.weight.clone()
    replace(runtime, capability=(9, 0)).arrange(encoder, transformer, vae)
    assert isinstance(encoder.fused_layers, NarrowLayers)
    fused = [level.resample and level.resample.fused for level in vae.decoder.levels]
    assert all(fused[:-1]) and fused[-1] is None
    assert isinstance(transformer.fused_blocks, fused_blocks.FusedBlocks)
    qkv, half, gates = 768, 128, 512
    assert torch.equal(single.qkv_mlp.weight[:qkv], before[:qkv])
    for after, rows in (
        (single.qkv_mlp.weight[qkv:], before[qkv:]),
        (stream.mlp_in.weight, mlp_before),
    ):
        assert torch.equal(after[:half], rows[:half])
        assert torch.equal(after[half : 2 * half], rows[gates:][:half])
    assert torch.equal(stream.qkv.weight, qkv_before)


@pytest.mark.parametrize(("batch", "tokens", "out"), [(2, 150, 90), (1, 70, 70)])
def test_blocks_in_fp8_are_those_of_the_plain_form(batch: int, tokens: int, out: int) -> None:
    exact, rounded, _ = transformers()
    assert not narrow_blocks.fits(rounded)
    quantise((*rounded.double_blocks, *rounded.single_blocks), FORMAT)
    assert narrow_blocks.fits(rounded) and not fused_blocks.fits(rounded)
    given = inputs(batch, tokens, out)
    found = narrow_blocks.NarrowBlocks(rounded)(*given)
    plain = rounded.run_blocks(*given)
    assert found.shape == (batch, out, CONFIG.width) and found.dtype == plain.dtype
    expected = exact.run_blocks(*given.wide())
    # The interpreter cuts digits off where a GPU rounds, of which fp8 has three.
    assert apart(found, expected) < (1.1 if IS_HOPPER else 2.5) * apart(plain, expected)


@pytest.mark.parametrize(("tokens", "first"), [(70, 0), (96, 0), (130, 40)])
def test_attention_of_few_tokens(tokens: int, first: int) -> None:
    heads = values(2, tokens, 3 * 2 * 128).bfloat16()
    out = torch.full((2, tokens - first, 300), torch.nan, device=DEVICE).bfloat16()
    few.attend(heads, out, first)
    q, k, v = (part.float() for part in fused_blocks.heads_of(heads))
    expected = plain_attention(q, k, v, None)[:, :, first:].transpose(1, 2).flatten(2)
    assert apart(out[..., :256], expected) < (0.004 if IS_HOPPER else 0.008)
    assert out[..., 256:].isnan().all(), "only the first columns are written"


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
def test_what_lies_behind_a_picture_s_last_token_has_no_part_in_it() -> None:
    heads = values(2, 70, 3 * 128).bfloat16()
    out, alone = (torch.empty(batch, 70, 128, device=DEVICE).bfloat16() for batch in (2, 1))
    few.attend(heads[:1], alone)
    heads[1] = torch.nan
    few.attend(heads, out)
    assert torch.equal(out[:1], alone)


def test_few_tokens_are_those_that_all_units_take_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "processors", lambda _: 132)
    for batch, tokens, is_short in ((1, 1024, True), (1, 1040, False), (4, 1024, True)):
        heads = torch.empty(batch, tokens, 3 * 24 * 128, device="meta")
        assert few.is_short(heads) is is_short
