"""Rotary position tables and how they turn queries and keys.

Source: diffusers models/embeddings.py (get_1d_rotary_pos_embed, apply_rotary_emb) and
transformers models/qwen3/modeling_qwen3.py; paper: RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each [L, K]; float32 for the transformer, in the form that turning wants."""


def axial_rope(ids: Tensor, axes: Sequence[int], theta: float, dtype: torch.dtype) -> Rope:
    """Tables for tokens with several coordinates, the axes side by side.

    Both channels of a pair have their cosine, and their sine with its sign: minus, plus.

    Shapes: ids [L, number of axes] -> cos, sin [L, sum(axes)], float32.
    ``dtype`` is that of the frequencies: float64 where the device has it.
    Source: diffusers Flux2PosEmbed.
    """
    angles = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=dtype, device=ids.device) / channels
        frequency = 1.0 / theta**exponent  # [channels/2]
        angles.append(torch.outer(ids[:, axis].to(dtype), frequency))  # [L, channels/2]
    angle = torch.cat(angles, dim=-1)  # [L, K/2]
    cos, sin = angle.cos().float(), angle.sin().float()
    return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring channels (2 i, 2 i + 1), in float32 as the reference does.

    Shapes: x [..., L, K] of any strides -> contiguous [..., L, K] in x's dtype.
    Source: diffusers apply_rotary_emb with use_real_unbind_dim=-1.
    """
    cos, sin = rope
    wide = x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)  # [..., L, K/2] each
    swapped = torch.stack((odd, even), dim=-1).flatten(-2)  # [..., L, K]
    return torch.addcmul(swapped * sin, wide, cos).to(x.dtype)


def half_rope(length: int, width: int, theta: float, device: torch.device) -> Rope:
    """Tables for ``rotate_halves``: positions 0 to length - 1, float32.

    Shapes: cos, sin [L, K], both halves alike.
    Source: transformers Qwen3RotaryEmbedding.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequency = 1.0 / theta**exponent  # [K/2]
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    angle = torch.cat((angle, angle), dim=-1)  # [L, K]
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, rope: Rope) -> Tensor:
    """Turn channel i with channel i + K/2.

    Shapes: x [B, H, L, K] -> [B, H, L, K].
    Source: transformers apply_rotary_pos_emb.
    """
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
