"""Rotary positions: both kinds turn as the references turn."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from fluxcore.models.rope import axial_rope, half_rope, rotate_halves, rotate_pairs

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_turn_as_diffusers_turns_them(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 600, (20, 4), generator=torch.Generator().manual_seed(1))
    cos, sin = axial_rope(ids, (8, 4, 12, 8), 2000.0, torch.float64)
    x = random(2, 3, 20, 32).to(dtype)
    assert torch.equal(sin[:, ::2], -sin[:, 1::2])
    doubled = cos, sin[:, 1::2].repeat_interleave(2, dim=-1)
    turned = rotate_pairs(x, (cos, sin))
    assert turned.dtype == dtype
    theirs = apply_rotary_emb(x, doubled, use_real_unbind_dim=-1)
    # One rounding fewer, where the processor adds and multiplies in one.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(turned, theirs, rtol=ulp, atol=ulp)


def test_pairs_of_any_strides_come_out_contiguous() -> None:
    ids = torch.arange(6)[:, None]
    rope = axial_rope(ids, (8,), 2000.0, torch.float64)
    x = random(1, 6, 2, 8).transpose(1, 2)  # [B, H, L, K]
    assert not x.is_contiguous()
    turned = rotate_pairs(x, rope)
    assert turned.is_contiguous()
    assert torch.equal(turned, rotate_pairs(x.contiguous(), rope))


def test_turning_keeps_lengths_and_leaves_position_0_alone() -> None:
    ids = torch.tensor([[0, 0], [3, 900]])
    x = random(1, 1, 2, 16)
    turned = rotate_pairs(x, axial_rope(ids, (8, 8), 2000.0, torch.float64))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    lengths = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    assert torch.allclose(turned.unflatten(-1, (-1, 2)).norm(dim=-1), lengths, atol=1e-6)


def test_products_depend_on_the_distance_only() -> None:
    """What makes positions relative: turning both by the same amount changes no score."""
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)
    scores = []
    for at in (0, 5, 300):
        turned_q = rotate_pairs(
            q, axial_rope(torch.tensor([[at + 7]]), (16,), 2000.0, torch.float64)
        )
        turned_k = rotate_pairs(k, axial_rope(torch.tensor([[at]]), (16,), 2000.0, torch.float64))
        scores.append((turned_q * turned_k).sum())
    assert torch.allclose(torch.stack(scores), scores[0], atol=1e-4)


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_halves_turn_as_transformers_turns_them(theta: float) -> None:
    config = Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = half_rope(512, 32, theta, CPU)
    q, k = random(1, 4, 512, 32), random(1, 2, 512, 32, seed=1)
    their_cos, their_sin = Qwen3RotaryEmbedding(config)(q, torch.arange(512)[None])
    assert torch.equal(cos, their_cos[0])
    assert torch.equal(sin, their_sin[0])
    their_q, their_k = apply_rotary_pos_emb(q, k, their_cos, their_sin)
    assert torch.equal(rotate_halves(q, (cos, sin)), their_q)
    assert torch.equal(rotate_halves(k, (cos, sin)), their_k)
