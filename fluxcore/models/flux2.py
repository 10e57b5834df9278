"""The FLUX.2 transformer: noisy image tokens and conditioning to velocity.

Works on token sequences; knows nothing of images, prompts or schedules.
Everything that depends only on the schedule enters as ``Modulation``, computed
for all steps at once by ``Flux2Transformer.modulation``.

Source: diffusers models/transformers/transformer_flux2.py; black-forest-labs/flux2
src/flux2/model.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcore.config import TransformerConfig
from fluxcore.kernels import Kernels, swiglu, wide_linear
from fluxcore.models.rope import Rope, rotate_pairs


class Modulation(NamedTuple):
    """AdaLN vectors of one step; shared by all blocks of a kind.

    Shapes: img and txt [6, 1, D] (shift, scale, gate of attention, then of the MLP),
    single [3, 1, D] (shift, scale, gate), final [2, 1, D] (scale, shift: this order).
    """

    img: Tensor
    txt: Tensor
    single: Tensor
    final: Tensor


def timestep_embedding(t: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Sinusoids of t * 1000, cosines first.

    Shapes: t [S] float32 in [0, 1] -> [S, channels] float32.
    Differs from the formula: t is rounded to the model's dtype as diffusers' pipeline
    rounds it, because in bf16 955.39 becomes 956 there, and a trained model has seen
    just that. In float32 the rounding is nothing.
    Source: diffusers models/embeddings.py get_timestep_embedding; the pipeline divides by
    1000 and the transformer multiplies by it, both in the model's dtype.
    """
    rounded = (t * 1000).to(dtype) / 1000 * 1000
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequency = torch.exp(-math.log(10_000) * exponent)  # [half]
    angle = rounded.float()[:, None] * frequency[None]  # [S, half]
    return torch.cat((angle.cos(), angle.sin()), dim=-1)  # [S, channels]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm: (1 + scale) * norm(x) + shift.

    Shapes: x [B, L, D], shift and scale [1, D] -> [B, L, D] in scale's dtype.
    """
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=eps).to(scale.dtype) + shift


class QKNorm(nn.Module):
    """RMS norm of queries and keys, each over one head.

    Shapes: qkv [B, L, 3 D] -> q, k, v [B, H, L, K], views where possible.
    """

    def __init__(self, heads: int, head_width: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.q_weight = nn.Parameter(torch.ones(head_width))
        self.k_weight = nn.Parameter(torch.ones(head_width))

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, K]
        q = F.rms_norm(q, self.q_weight.shape, self.q_weight, self.eps)
        k = F.rms_norm(k, self.k_weight.shape, self.k_weight, self.eps)
        return q, k, v


class Stream(nn.Module):
    """The weights of one stream, img or txt, of a double block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.eps = config.norm_eps
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_norm = QKNorm(config.heads, config.head_width, config.norm_eps)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.mlp_out = nn.Linear(config.mlp_width, width, bias=False)

    def project(self, x: Tensor, mod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: x [B, L, D], mod [6, 1, D] -> q, k, v [B, H, L, K]."""
        q, k, v = self.qk_norm(self.qkv(modulate(x, mod[0], mod[1], self.eps)))
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, mod: Tensor) -> Tensor:
        """Add the attention's output and the MLP. Shapes: x, attended [B, L, D] -> [B, L, D]."""
        x = x + mod[2] * wide_linear(attended, self.out)
        gate, value = self.mlp_in(modulate(x, mod[3], mod[4], self.eps)).chunk(2, dim=-1)
        return x + mod[5] * wide_linear(swiglu(gate, value), self.mlp_out)


class DoubleBlock(nn.Module):
    """Joint attention over [txt, img]; each stream keeps its own weights.

    Shapes: img [B, L_img, D], txt [B, L_txt, D] -> the same.
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attention = kernels.attention
        self.img = Stream(config)
        self.txt = Stream(config)

    def forward(self, img: Tensor, txt: Tensor, mod: Modulation, pe: Rope) -> tuple[Tensor, Tensor]:
        of_txt = self.txt.project(txt, mod.txt)
        of_img = self.img.project(img, mod.img)
        # joint order: [txt, img]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_txt, of_img, strict=True))
        joint = self.attention(rotate_pairs(q, pe), rotate_pairs(k, pe), v, None)  # [B, H, L, K]
        joint = joint.transpose(1, 2).flatten(2)  # [B, L, D]
        of_txt_len = txt.shape[1]
        txt = self.txt.finish(txt, joint[:, :of_txt_len], mod.txt)
        img = self.img.finish(img, joint[:, of_txt_len:], mod.img)
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the concatenation [txt, img].

    Shapes: x [B, L, D] -> [B, L, D].
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        width, mlp = config.width, config.mlp_width
        self.eps = config.norm_eps
        self.sizes = (3 * width, 2 * mlp)
        self.attention = kernels.attention
        self.qkv_mlp = nn.Linear(width, sum(self.sizes), bias=False)
        self.qk_norm = QKNorm(config.heads, config.head_width, config.norm_eps)
        self.out = nn.Linear(width + mlp, width, bias=False)

    def forward(self, x: Tensor, mod: Tensor, pe: Rope) -> Tensor:
        shift, scale, gate = mod
        qkv, mlp = self.qkv_mlp(modulate(x, shift, scale, self.eps)).split(self.sizes, dim=-1)
        q, k, v = self.qk_norm(qkv)  # [B, H, L, K]
        attended = self.attention(rotate_pairs(q, pe), rotate_pairs(k, pe), v, None)
        attended = attended.transpose(1, 2).flatten(2)  # [B, L, D]
        hidden = swiglu(*mlp.chunk(2, dim=-1))
        joined = torch.cat((attended.to(hidden.dtype), hidden), dim=-1)  # [B, L, D + mlp]
        x = x + gate * wide_linear(joined, self.out)
        return x


class Flux2Transformer(nn.Module):
    """Velocity of the image tokens.

    Shapes: img [B, L_img, C] (noisy tokens, then references), txt [B, L_txt, 3 D_text],
    pe for [txt, img] -> [B, L_out, C], the first ``out_tokens`` of img.
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.kernels = kernels
        self.time_in = nn.Linear(config.time_channels, width, bias=False)
        self.time_out = nn.Linear(width, width, bias=False)
        self.modulations = nn.Linear(width, (6 + 6 + 3 + 2) * width, bias=False)
        self.img_in = nn.Linear(config.in_channels, width, bias=False)
        self.txt_in = nn.Linear(config.text_width, width, bias=False)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, kernels) for _ in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, kernels) for _ in range(config.single_blocks)
        )
        self.img_out = nn.Linear(width, config.out_channels, bias=False)

    def modulation(self, t: Tensor) -> list[Modulation]:
        """All AdaLN vectors of all steps, in one pass over the modulation weights.

        Shapes: t [S] float32 in [0, 1] -> S modulations.
        """
        dtype = self.time_in.weight.dtype
        sinusoids = timestep_embedding(t, self.config.time_channels, dtype).to(dtype)
        vec = self.time_out(F.silu(self.time_in(sinusoids)))  # [S, D]
        rows = self.modulations(F.silu(vec))  # [S, 17 D]
        rows = rows.unflatten(-1, (17, 1, self.config.width))  # [S, 17, 1, D]
        return [Modulation(*row.split((6, 6, 3, 2))) for row in rows]

    def forward(
        self, img: Tensor, txt: Tensor, mod: Modulation, pe: Rope, out_tokens: int
    ) -> Tensor:
        img = self.kernels.residual(self.img_in(img))  # [B, L_img, D]
        txt = self.kernels.residual(wide_linear(txt, self.txt_in))  # [B, L_txt, D]
        for block in self.double_blocks:
            img, txt = block(img, txt, mod, pe)
        x = torch.cat((txt, img), dim=1)  # joint order: [txt, img]
        for block in self.single_blocks:
            x = block(x, mod.single, pe)
        x = x[:, txt.shape[1] : txt.shape[1] + out_tokens]  # [B, L_out, D]
        scale, shift = mod.final
        return self.img_out(modulate(x, shift, scale, self.config.norm_eps))  # type: ignore[no-any-return]
