"""The FLUX.2 transformer: noisy image tokens and conditioning to velocity.

Works on token sequences; knows nothing of images, prompts or schedules.
What is the same in all steps, or known before the first, is computed apart:
``Flux2Transformer.modulation`` gives what depends only on the schedule, for all
steps at once, ``Flux2Transformer.text_tokens`` what depends only on the text.

Source: diffusers models/transformers/transformer_flux2.py; black-forest-labs/flux2
src/flux2/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcore.config import TransformerConfig
from fluxcore.kernels import Kernels, for_heads, narrow_linear, wide_linear
from fluxcore.models.rope import Rope, rotate_pairs


class Modulation(NamedTuple):
    """AdaLN vectors of one step; shared by all blocks of a kind.

    A factor is 1 + the scale that the weights give. The dtype is the residual stream's.

    Shapes: img and txt [6, 1, D] (shift, factor, gate of attention, then of the MLP),
    single [3, 1, D] (shift, factor, gate), final [2, 1, D] (factor, shift: this order).
    """

    img: Tensor
    txt: Tensor
    single: Tensor
    final: Tensor

    @classmethod
    def of_rows(cls, rows: Tensor) -> Modulation:
        """From what the modulation weights give. Shapes: [17, ..., D].

        Nothing comes from the host, for which a GPU would have to end what it is at.
        """
        parts = [row + 1 if i in SCALE_ROWS else row for i, row in enumerate(rows)]
        return cls(*torch.stack(parts).split((6, 6, 3, 2)))


ALL = slice(None)
MODULATION_ROWS = 6 + 6 + 3 + 2
SCALE_ROWS = (1, 4, 7, 10, 13, 15)


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


def modulate(x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """Adaptive layer norm: factor * norm(x) + shift.

    Differs from diffusers: where all rows share one noise level it is one kernel, which
    rounds once, not three times.

    Shapes: x [B, L, D], shift and factor [1, D] or [B, 1, D] -> [B, L, D].
    """
    width = x.shape[-1:]
    if factor.numel() == x.shape[-1]:
        return F.layer_norm(x, width, factor.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, factor, F.layer_norm(x, width, eps=eps))


def modulated(linear: nn.Module, x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """A projection of modulated rows. Shapes: x [B, L, D] -> [B, L, M]."""
    return narrow_linear(modulate(x, shift, factor, eps), linear)


class QKNorm(nn.Module):
    """RMS norm of queries and keys, each over one head.

    Shapes: qkv [B, L, 3 D] -> qk [2, B, H, L, K], v [B, H, L, K], a view.
    """

    def __init__(self, heads: int, head_width: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(2 * head_width))

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        split = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, L, K]
        qk, v = split[:2], split[2]
        weight = self.weight.view(2, 1, 1, 1, -1)
        return F.rms_norm(qk, qk.shape[-1:], eps=self.eps) * weight, v


def joint_heads(
    streams: Sequence[tuple[Tensor, QKNorm]], pe: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normed and turned, and values of one stream or several on end.

    Shapes: each stream's qkv [B, L_i, 3 D] with its norm, pe for all L tokens -> q, k and v
    [B, H, L, K].
    """
    parts = [norm(qkv) for qkv, norm in streams]
    if len(parts) == 1:
        qk, v = parts[0]
    else:
        qk, v = (torch.cat(pair, dim=-2) for pair in zip(*parts, strict=True))
    q, k = rotate_pairs(qk, pe)
    return q, k, v


class Stream(nn.Module):
    """The weights of one stream, img or txt, of a double block."""

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        width = config.width
        self.eps = config.norm_eps
        self.modulated = kernels.modulated or modulated
        self.add_gated = kernels.add_gated
        self.gated = kernels.gated
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_norm = QKNorm(config.heads, config.head_width, config.norm_eps)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.mlp_out = nn.Linear(config.mlp_width, width, bias=False)

    def project(self, x: Tensor, mod: Tensor) -> tuple[Tensor, QKNorm]:
        """Shapes: x [B, L, D], mod [6, 1, D] -> qkv [B, L, 3 D], and how it is normed."""
        return self.modulated(self.qkv, x, mod[0], mod[1], self.eps), self.qk_norm

    def finish(self, x: Tensor, attended: Tensor, mod: Tensor) -> Tensor:
        """Add the attention's output and the MLP. Shapes: x, attended [B, L, D] -> [B, L, D]."""
        x = self.add_gated(x, mod[2], wide_linear(attended, self.out))
        hidden = self.modulated(self.mlp_in, x, mod[3], mod[4], self.eps)
        return self.add_gated(x, mod[5], self.gated(self.mlp_out, hidden))


class DoubleBlock(nn.Module):
    """Joint attention over [txt, img]; each stream keeps its own weights.

    Shapes: img [B, L_img, D], txt [B, L_txt, D] -> the same.
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        self.attention = kernels.attention
        self.joint_heads = for_heads(config.head_width, kernels.joint_heads, joint_heads)
        self.img = Stream(config, kernels)
        self.txt = Stream(config, kernels)

    def forward(self, img: Tensor, txt: Tensor, mod: Modulation, pe: Rope) -> tuple[Tensor, Tensor]:
        # joint order: [txt, img]
        streams = (self.txt.project(txt, mod.txt), self.img.project(img, mod.img))
        q, k, v = self.joint_heads(streams, pe)
        joint = self.attention(q, k, v, None)  # [B, H, L, K]
        joint = joint.transpose(1, 2).flatten(2)  # [B, L, D]
        of_txt_len = txt.shape[1]
        txt = self.txt.finish(txt, joint[:, :of_txt_len], mod.txt)
        img = self.img.finish(img, joint[:, of_txt_len:], mod.img)
        return img, txt


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the concatenation [txt, img].

    Shapes: x [B, L, D] -> [B, L_kept, D], of the rows that are asked for.
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        width, mlp = config.width, config.mlp_width
        self.eps = config.norm_eps
        self.sizes = (3 * width, 2 * mlp)
        self.attention = kernels.attention
        self.modulated = kernels.modulated or modulated
        self.joint_heads = for_heads(config.head_width, kernels.joint_heads, joint_heads)
        self.add_gated = kernels.add_gated
        self.gated = kernels.gated
        self.qkv_mlp = nn.Linear(width, sum(self.sizes), bias=False)
        self.qk_norm = QKNorm(config.heads, config.head_width, config.norm_eps)
        self.out = nn.Linear(width + mlp, width, bias=False)

    def forward(self, x: Tensor, mod: Tensor, pe: Rope, kept: slice = ALL) -> Tensor:
        shift, factor, gate = mod
        projected = self.modulated(self.qkv_mlp, x, shift, factor, self.eps)
        qkv, mlp = projected.split(self.sizes, dim=-1)
        q, k, v = self.joint_heads(((qkv, self.qk_norm),), pe)
        attended = self.attention(q[:, :, kept], k, v, None)  # [B, H, L_kept, K]
        attended = attended.transpose(1, 2).flatten(2)  # [B, L_kept, D]
        # self.out takes [attended, gated mlp], D + mlp columns.
        return self.add_gated(x[:, kept], gate, self.gated(self.out, mlp[:, kept], attended))


class Flux2Transformer(nn.Module):
    """Velocity of the image tokens.

    Shapes: img [B, L_img, C] (noisy tokens, then references), txt [B, L_txt, D] as
    ``text_tokens`` gives it, pe for [txt, img] -> [B, L_out, C], the first ``out_tokens``
    of img.
    """

    def __init__(self, config: TransformerConfig, kernels: Kernels) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.kernels = kernels
        self.modulated = kernels.modulated or modulated
        self.time_in = nn.Linear(config.time_channels, width, bias=False)
        self.time_out = nn.Linear(width, width, bias=False)
        self.modulations = nn.Linear(width, MODULATION_ROWS * width, bias=False)
        self.img_in = nn.Linear(config.in_channels, width, bias=False)
        self.txt_in = nn.Linear(config.text_width, width, bias=False)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, kernels) for _ in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, kernels) for _ in range(config.single_blocks)
        )
        self.img_out = nn.Linear(width, config.out_channels, bias=False)
        # Another form of ``run_blocks`` where weights are laid out for it.
        self.fused_blocks: Callable[..., Tensor] | None = None

    def modulation(self, t: Tensor) -> list[Modulation]:
        """All AdaLN vectors of all steps, in one pass over the modulation weights.

        Shapes: t [S] float32 in [0, 1] -> S modulations.
        """
        dtype = self.time_in.weight.dtype
        sinusoids = timestep_embedding(t, self.config.time_channels, dtype).to(dtype)
        vec = self.time_out(F.silu(self.time_in(sinusoids)))  # [S, D]
        rows = self.kernels.residual(self.modulations(F.silu(vec)))  # [S, 17 D]
        rows = rows.unflatten(-1, (MODULATION_ROWS, 1, self.config.width))  # [S, 17, 1, D]
        of_all = Modulation.of_rows(rows.transpose(0, 1))
        # Each with storage of its own: a compiler makes another form for tensors that begin inside
        # one, whose results differ in the last bit.
        return [Modulation(*(part[:, i].clone() for part in of_all)) for i in range(len(t))]

    def text_tokens(self, embeddings: Tensor) -> Tensor:
        """Text embeddings as the blocks take them, the same in every step.

        Shapes: embeddings [B, L_txt, 3 D_text] -> [B, L_txt, D] in the residual stream's dtype.
        Differs from diffusers: once a picture, not in each step.
        """
        return self.kernels.residual(wide_linear(embeddings, self.txt_in))  # [B, L_txt, D]

    def forward(
        self, img: Tensor, txt: Tensor, mod: Modulation, pe: Rope, out_tokens: int
    ) -> Tensor:
        img = self.kernels.residual(self.img_in(img))  # [B, L_img, D]
        run = self.fused_blocks or self.run_blocks
        x = run(img, txt, mod, pe, out_tokens)
        factor, shift = mod.final
        return self.modulated(self.img_out, x, shift, factor, self.config.norm_eps)

    def run_blocks(
        self, img: Tensor, txt: Tensor, mod: Modulation, pe: Rope, out_tokens: int
    ) -> Tensor:
        """All blocks, one after the other. Shapes: img and txt [B, L_i, D] -> [B, L_out, D].

        Differs from diffusers: of what nobody reads, the last block's attention and output are
        left out; that is two thirds of its rows at 256x256.
        """
        for block in self.double_blocks:
            img, txt = block(img, txt, mod, pe)
        x = torch.cat((txt, img), dim=1)  # joint order: [txt, img]
        asked = slice(txt.shape[1], txt.shape[1] + out_tokens)
        last = len(self.single_blocks) - 1
        for number, block in enumerate(self.single_blocks):
            x = block(x, mod.single, pe, asked if number == last else ALL)
        return x
