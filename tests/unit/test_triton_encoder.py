"""The text encoder's kernels against the plain forms: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fluxcore.config import Qwen3Config
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.models import Qwen3Encoder, qwen3
from fluxcore.models.qwen3 import causal_mask
from fluxcore.models.rope import Rope, half_rope
from fluxcore.runtime.quantised import (
    FP8,
    PLAIN_FP8,
    EightBitLinear,
    EightBits,
    plain_product,
    plain_unscaled,
    quantise,
)
from tests.unit.interpreted import interpreter_that_knows_bfloat16

pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a CUDA GPU nor TRITON_INTERPRET=1", allow_module_level=True)
from fluxcore.runtime import triton_encoder as fused  # noqa: E402
from fluxcore.runtime import triton_heads, triton_kernels  # noqa: E402
from fluxcore.runtime.triton_addends import Addend  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDS = pytest.mark.skipif(not ON_GPU, reason="fp8 is multiplied by GPUs only")
ROUNDED = replace(FP8, rounding=triton_kernels.round_rows)
PLAIN = Kernels(plain_attention, plain_attention)
FUSED = replace(
    PLAIN,
    prompt_attention=fused.prompt_attention,
    projected=fused.projected,
    grouped_heads=triton_heads.grouped_heads,
    gated=triton_kernels.gated_linear,
)
CONFIG = Qwen3Config(
    vocabulary=50,
    width=48,
    layers=28,
    heads=4,
    kv_heads=2,
    head_width=16,
    mlp_width=80,
    norm_eps=1e-6,
    rope_theta=1e6,
)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if ON_GPU:
        yield
    else:
        yield from interpreter_that_knows_bfloat16(monkeypatch)


def values(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE).bfloat16()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("tokens", [150, 64, 10])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_no_token_of_a_prompt_sees_a_later_one_or_padding(tokens: int, kv_heads: int) -> None:
    # Parts of wider rows, as the layer has them.
    q = values(2, tokens, 4 * 16 + 8)[..., 8:].unflatten(-1, (4, 16)).transpose(1, 2)
    k, v = (
        values(2, tokens, kv_heads * 16, seed=seed).unflatten(-1, (-1, 16)).transpose(1, 2)
        for seed in (1, 2)
    )
    counts = torch.tensor([tokens, max(1, tokens // 2 - 1)], device=DEVICE)
    found = fused.prompt_attention(q, k, v, counts)
    wide = (x.float() for x in (q, k, v))
    expected = plain_attention(*wide, causal_mask(tokens, counts))
    assert found.shape == expected.shape and found.dtype == q.dtype
    # The interpreter cuts digits off where a GPU rounds.
    assert apart(found, expected) < (0.004 if ON_GPU else 0.008)


def test_padding_has_no_part_in_attention_whatever_it_holds() -> None:
    q, k, v = (values(1, 2, 40, 16, seed=seed) for seed in range(3))
    counts = torch.tensor([17], device=DEVICE)
    before = fused.prompt_attention(q, k, v, counts)
    k[:, :, 17:], v[:, :, 17:] = torch.nan, torch.inf
    assert torch.equal(fused.prompt_attention(q, k, v, counts), before)


@pytest.mark.parametrize("is_added", [True, False])
def test_a_norm_with_what_is_added_before(is_added: bool) -> None:
    x, update = values(2, 5, 48), values(2, 5, 48, seed=1) if is_added else None
    norm = qwen3.RMSNorm(48, 1e-6).bfloat16().to(DEVICE)
    norm.weight.data += values(48, seed=2) / 4
    norm.requires_grad_(False)
    total, found = fused.projected(nn.Identity(), x, update, norm)
    exact = x.float() if update is None else (x.float() + update.float())
    # What is added is rounded before it is normed, as it goes on.
    assert apart(total, exact) < 0.004
    expected = norm.float()(total.float())
    assert apart(found, expected) < (0.003 if ON_GPU else 0.006)
    assert update is not None or total is x


def test_scales_that_a_product_left_out_are_multiplied_as_it_is_added() -> None:
    x, product = values(2, 5, 48), values(2, 5, 48, seed=1) * 1e5
    of_rows = values(10, 1, seed=2).float().exp() / 1e2
    of_columns = values(1, 48, seed=3).float().exp() / 1e3
    norm = qwen3.RMSNorm(48, 1e-6).bfloat16().to(DEVICE).requires_grad_(False)
    addend = Addend(product, (of_rows, of_columns))
    total, found = fused.projected(nn.Identity(), x, addend, norm)
    update = (product.float().view(10, 48) * of_rows * of_columns).view(x.shape)
    # The interpreter cuts digits off where a GPU rounds.
    assert apart(total, x.float() + update) < (0.004 if ON_GPU else 0.006)
    assert apart(addend.whole(), update) < 0.004
    assert apart(found, norm.float()(total.float())) < (0.003 if ON_GPU else 0.006)


def layers() -> tuple[qwen3.Qwen3Layer, qwen3.Qwen3Layer, qwen3.Qwen3Layer]:
    """One in float32, the same in bfloat16, and that one with the kernels."""
    made = [qwen3.Qwen3Layer(CONFIG, choice).to(DEVICE) for choice in (PLAIN, PLAIN, FUSED)]
    for layer in made:
        fill(layer)
    exact, rounded, fused_one = made
    return exact, rounded.bfloat16(), fused_one.bfloat16()


def fill(network: nn.Module) -> None:
    """Draw weights that bfloat16 has."""
    for seed, parameter in enumerate(network.parameters()):
        shape = parameter.shape
        drawn = values(*shape, seed=seed).float() / (shape[-1] ** 0.5 if len(shape) > 1 else 4)
        parameter.data = (drawn + (len(shape) == 1)).bfloat16().float()
    network.requires_grad_(False)


def inputs(*counts: int) -> tuple[Tensor, Rope, Tensor, Tensor]:
    """x, the tables of positions, how many tokens each prompt has, and the mask of these."""
    token_count = torch.tensor(counts, device=DEVICE)
    rope = half_rope(24, CONFIG.head_width, CONFIG.rope_theta, DEVICE)
    return values(len(counts), 24, CONFIG.width), rope, token_count, causal_mask(24, token_count)


def test_a_layer_is_as_near_to_float32_as_rounding_is() -> None:
    exact, rounded, fused_one = layers()
    x, rope, token_count, mask = inputs(24, 9)
    narrow = (rope[0].bfloat16(), rope[1].bfloat16())
    expected = exact(x.float(), rope, mask)
    most = apart(rounded(x, narrow, mask), expected)
    assert apart(fused_one(x, narrow, token_count), expected) < (1.1 if ON_GPU else 3) * most


@pytest.mark.parametrize("width", [8, 24])
def test_heads_that_the_kernels_do_not_take_have_the_plain_form(width: int) -> None:
    encoder = Qwen3Encoder(replace(CONFIG, head_width=width), FUSED)
    assert encoder.kernels.prompt_attention is None
    assert all(layer.attention.attention is plain_attention for layer in encoder.layers)
    fit = Qwen3Encoder(CONFIG, FUSED)
    assert fit.layers[0].attention.attention is fused.prompt_attention


@ROUNDS
def test_fp8_layers_get_norms_that_are_rounded_already() -> None:
    """Bit for bit what they round themselves."""
    x, update = values(1, 40, 64), values(1, 40, 64, seed=1)
    norm = qwen3.RMSNorm(64, 1e-6).bfloat16().to(DEVICE)
    layer = EightBitLinear(nn.Linear(64, 48, bias=False).bfloat16().to(DEVICE), ROUNDED)
    total, found = fused.projected(layer, x, update, norm)
    same, normed = fused.projected(nn.Identity(), x, update, norm)
    assert torch.equal(total, same) and torch.equal(found, layer(normed))


@ROUNDS
def test_a_layer_in_fp8_is_near_the_one_in_bfloat16() -> None:
    exact, _, fused_one = layers()
    assert quantise([fused_one], ROUNDED) > 0
    x, rope, token_count, mask = inputs(9)
    found = fused_one(x, (rope[0].bfloat16(), rope[1].bfloat16()), token_count)
    # fp8 rounds each value by up to a sixteenth
    assert 0.005 < apart(found, exact(x.float(), rope, mask)) < 0.1


SIXTEEN = EightBits(torch.bfloat16, 448.0, plain_product, unscaled=plain_unscaled)
"""Scaled as fp8 is, with digits enough to tell one layer's sum from the next one's."""


def encoder(kernels: Kernels) -> Qwen3Encoder:
    """Its last layer is the model's last, which has a norm of its own."""
    made = Qwen3Encoder(replace(CONFIG, layers=27), kernels).to(DEVICE)
    fill(made)
    for layer in made.layers:
        layer.down.weight *= 4  # else the last layer's is lost among the others
    return made


@pytest.mark.parametrize("format", [SIXTEEN, pytest.param(ROUNDED, marks=ROUNDS)])
def test_layers_that_leave_scales_out_give_the_states_of_the_plain_form(format: EightBits) -> None:
    ids = torch.arange(8, device=DEVICE).view(2, 4)
    count = torch.tensor([4, 2], device=DEVICE)
    expected = encoder(PLAIN)(ids, count)
    plain, narrow = encoder(PLAIN).bfloat16(), encoder(FUSED).bfloat16()
    assert not fused.fits(narrow)
    for network in (plain, narrow):
        quantise(network.layers, format)
    assert fused.fits(narrow)
    narrow.fused_layers = fused.NarrowLayers(narrow)
    found, plainly = narrow(ids, count), plain(ids, count)
    assert found.shape == expected.shape and found.dtype == torch.bfloat16
    for state, rounded, exact in zip(
        *(x.split(48, dim=-1) for x in (found, plainly, expected)), strict=True
    ):
        # Measured: 1.05 times as far where sums are rounded, 2.1 where the interpreter cuts them.
        assert apart(state, exact) < (1.5 if ON_GPU else 3) * apart(rounded, exact)


def test_layers_whose_products_need_scales_keep_their_own_order() -> None:
    for unscaled, is_fit in ((plain_unscaled, True), (None, False)):
        network = encoder(FUSED).bfloat16()
        quantise(network.layers[:-1], PLAIN_FP8)
        assert not fused.fits(network)
        quantise(network.layers[-1:], replace(PLAIN_FP8, unscaled=unscaled))
        assert fused.fits(network) is is_fit
