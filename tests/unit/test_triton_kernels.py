"""Kernels in Triton against the plain forms: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fluxcore import kernels as plain
from fluxcore.models import flux2, qwen3, vae
from fluxcore.models.rope import Rope, half_rope
from fluxcore.runtime.quantised import FP8, EightBitLinear

pytest.importorskip("triton", reason="Triton is not installed")
# exp of what is far below zero is infinite, and what is divided by it zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a CUDA GPU nor TRITON_INTERPRET=1", allow_module_level=True)
from fluxcore.runtime import triton_heads as fused_heads  # noqa: E402
from fluxcore.runtime import triton_kernels as fused  # noqa: E402
from fluxcore.runtime import triton_vae as fused_vae  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDS = pytest.mark.skipif(not ON_GPU, reason="fp8 is multiplied by GPUs only")
ROUNDED = replace(FP8, rounding=fused.round_rows)
SAME = nn.Identity()
PLAIN = plain.Kernels(plain.plain_attention, plain.plain_attention)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE, dtype)


def rope_of_pairs(tokens: int, width: int) -> Rope:
    """As the model makes them: of two neighbours the first has its sine's sign turned round."""
    angle = values(tokens, width // 2, dtype=torch.float32).repeat_interleave(2, dim=1)
    sign = torch.tensor([-1.0, 1.0], device=DEVICE).repeat(width // 2)
    return angle.cos(), angle.sin() * sign


def assert_near(found: Tensor, expected: Tensor) -> None:
    """As near as rounding once is to rounding often."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("levels", [1, 2], ids=["one level", "one for each picture"])
def test_modulation(width: int, levels: int) -> None:
    rows = (1, width) if levels == 1 else (2, 1, width)
    x, shift, factor = values(2, 5, width) + 3, values(*rows, seed=1), values(*rows, seed=2)
    expected = flux2.modulate(x.float(), shift.float(), factor.float(), 1e-6).bfloat16()
    assert_near(fused.modulated(SAME, x, shift, factor, 1e-6), expected)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("lengths", [(7,), (5, 9)], ids=["single block", "double block"])
def test_heads_of_joint_attention(heads: int, lengths: tuple[int, ...]) -> None:
    width = 16
    streams = []
    for number, length in enumerate(lengths):
        norm = flux2.QKNorm(heads, width, 1e-6).bfloat16().to(DEVICE)
        norm.weight.data += values(2 * width, seed=number) / 4
        # A part of wider rows, as the single blocks have it.
        rows = values(2, length, 3 * heads * width + 8, seed=number + 9)
        streams.append((rows[..., : 3 * heads * width], norm))
    pe = rope_of_pairs(sum(lengths), width)
    for found, expected in zip(
        fused_heads.joint_heads(streams, pe), flux2.joint_heads(streams, pe), strict=True
    ):
        assert_near(found, expected)


def test_heads_of_the_text_encoder() -> None:
    width, heads = 16, (8, 2)
    norms = [qwen3.RMSNorm(width, 1e-6).bfloat16().to(DEVICE) for _ in "qk"]
    for number, norm in enumerate(norms):
        norm.weight.data += values(width, seed=number) / 4
    qkv = values(2, 6, (8 + 2 + 2) * width)
    cos, sin = (part.bfloat16() for part in half_rope(6, width, 1e4, DEVICE))
    args = (qkv, *norms, heads, (cos, sin))
    for found, expected in zip(
        fused_heads.grouped_heads(*args), qwen3.grouped_heads(*args), strict=True
    ):
        assert_near(found, expected)


@pytest.mark.parametrize("kept", [0, 40])
def test_gates(kept: int) -> None:
    hidden = values(2, 3, 2 * 1100 + 8)[..., 8:]
    before = values(2, 3, kept, seed=1) if kept else None
    assert_near(fused.gated(hidden, before), plain.gated(hidden, before))


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 4), (96, 3)])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norms(channels: int, groups: int, silu: bool) -> None:
    norm = nn.GroupNorm(groups, channels, eps=1e-6).bfloat16().to(DEVICE)
    norm.weight.data += values(channels) / 4
    norm.bias.data += values(channels, seed=1)
    # A mean that is large beside the spread: what a difference of squares would lose.
    x = (values(2, channels, 37, 51, dtype=torch.float32) + 50).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    found = fused_vae.normed(x, norm, silu=silu)
    # In float64: PyTorch's own norm of float32 is further from it than what is tested.
    expected = vae.normed(x.double(), norm.double(), silu=silu).bfloat16()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_near(found, expected)


def test_sums_of_many_parts_are_all_added() -> None:
    norm = nn.GroupNorm(1, 64, eps=1e-6).bfloat16().to(DEVICE)
    x = values(1, 64, 130, 130).contiguous(memory_format=torch.channels_last)
    x[:, :, 100:] += 5  # far behind the first parts
    expected = vae.normed(x.double(), norm.double(), silu=False).bfloat16()
    assert_near(fused_vae.normed(x, norm.bfloat16(), silu=False), expected)


@pytest.mark.parametrize(("channels_in", "channels_out"), [(32, 32), (64, 32)])
def test_residual_blocks_of_the_vae(channels_in: int, channels_out: int) -> None:
    block = vae.ResidualBlock(channels_in, channels_out, 4, PLAIN).bfloat16().to(DEVICE)
    for number, parameter in enumerate(block.parameters()):
        parameter.data += values(*parameter.shape, seed=number) / 4
    block.requires_grad_(False)
    x = values(2, channels_in, 13, 9).contiguous(memory_format=torch.channels_last)
    found = fused_vae.residual_block(block, x)
    expected = block.float()(x.float()).bfloat16()
    assert torch.linalg.vector_norm(found - expected) < 0.02 * torch.linalg.vector_norm(expected)


def test_pictures_doubled() -> None:
    upsample = vae.Upsample(24).to(DEVICE)
    x = values(2, 24, 5, 7).contiguous(memory_format=torch.channels_last)
    for weights in upsample.parameters():
        weights.data = weights.bfloat16().float()
    expected = upsample(x.float())
    upsample.bfloat16()
    plainly = upsample(x).float()
    upsample.fused = fused_vae.FusedUpsample(upsample.conv)
    found = upsample(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    away, most = ((other.float() - expected).norm() for other in (found, plainly))
    # The sums of weights are rounded, too: measured 1.4 times as far as the plain form, and 2.3
    # times by the interpreter, which cuts digits off where a GPU rounds.
    assert found.shape == expected.shape and away < (1.7 if ON_GPU else 3) * most


def test_weights_of_scores() -> None:
    scores = values(2, 3, 70, dtype=torch.float32) * 40
    found = fused_vae.weighed(scores, 0.25, torch.bfloat16)
    assert_near(found, (scores * 0.25).softmax(dim=-1).bfloat16())


def test_gated_updates() -> None:
    x, gate, y = values(2, 3, 1100), values(1, 1100, seed=1), values(2, 3, 1100, seed=2)
    assert_near(fused.add_gated(x, gate, y), torch.addcmul(x, gate, y))


def test_what_a_kernel_does_not_take_goes_to_the_plain_form() -> None:
    norm = nn.GroupNorm(2, 24).bfloat16().to(DEVICE)  # 12 channels a group
    x = values(1, 24, 5, 5)
    assert torch.equal(fused_vae.normed(x, norm), vae.normed(x, norm))
    x, factors = values(2, 5, 64), values(2, 1, 64)  # a noise level for each picture
    assert torch.equal(
        fused.modulated(SAME, x, factors, factors, 1e-6),
        flux2.modulate(x, factors, factors, 1e-6),
    )
    assert torch.equal(fused.add_gated(x, factors, x), torch.addcmul(x, factors, x))


def test_tensors_that_lie_otherwise_in_memory_are_taken_as_they_are() -> None:
    """Some tokens of longer pictures, and channels that do not lie side by side."""
    x, vector = values(2, 7, 64)[:, 2:], values(1, 64, seed=1)
    expected = flux2.modulate(x, vector, vector, 1e-6)
    assert_near(fused.modulated(SAME, x, vector, vector, 1e-6), expected)
    for y in (x.contiguous(), x):
        assert torch.equal(fused.add_gated(x, vector, y), torch.addcmul(x, vector, y))
        assert torch.equal(fused.add_gated(y, vector, x), torch.addcmul(y, vector, x))
    apart = values(2, 64, 5).transpose(1, 2)
    for hidden in (x, apart):
        for before in (None, x, apart):
            assert_near(fused.gated(hidden, before), plain.gated(hidden, before))
    norm = flux2.QKNorm(2, 16, 1e-6).bfloat16().to(DEVICE)
    streams, pe = ((values(2, 7, 96)[:, 2:], norm),), rope_of_pairs(5, 16)
    for found, turned in zip(
        fused_heads.joint_heads(streams, pe), flux2.joint_heads(streams, pe), strict=True
    ):
        assert_near(found, turned)
    picture = values(2, 32, 6, 5)
    group_norm = nn.GroupNorm(4, 32).bfloat16().to(DEVICE)
    assert torch.equal(fused_vae.normed(picture, group_norm), vae.normed(picture, group_norm))
    block = vae.ResidualBlock(32, 32, 4, PLAIN).bfloat16().to(DEVICE).requires_grad_(False)
    block.conv1.bias.data += 3
    block.conv2.bias.data += 3
    assert_near(fused_vae.residual_block(block, picture), block(picture))


@ROUNDS
def test_rounding_to_fp8() -> None:
    x = values(7, 300) * values(7, 1, seed=1).exp()
    x[3] = 0
    for found, expected in zip(ROUNDED.round_rows(x), FP8.round_rows(x), strict=True):
        assert found.dtype == expected.dtype
        assert torch.allclose(found.float(), expected.float(), rtol=0.07)


@ROUNDS
def test_fp8_layers_get_rows_that_are_rounded_already() -> None:
    """Bit for bit what they round themselves."""
    x, shift, factor = values(1, 40, 64), values(1, 64, seed=1), values(1, 64, seed=2)
    layer = EightBitLinear(nn.Linear(64, 48, bias=False).bfloat16().to(DEVICE), ROUNDED)
    apart = layer(fused.modulated(SAME, x, shift, factor, 1e-6))
    assert torch.equal(fused.modulated(layer, x, shift, factor, 1e-6), apart)
    hidden, before = values(1, 40, 96), values(1, 40, 16, seed=1)
    assert torch.equal(
        fused.gated_linear(layer, hidden, before), layer(fused.gated(hidden, before))
    )
    layer = EightBitLinear(nn.Linear(48, 32, bias=False).bfloat16().to(DEVICE), ROUNDED)
    assert torch.equal(fused.gated_linear(layer, hidden), layer(fused.gated(hidden)))
