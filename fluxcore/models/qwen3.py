"""The text encoder: Qwen3 up to the last hidden state that the conditioning reads.

Knows nothing of tokens' text. Parameter names are ours; fluxcore.weights maps
the published names to them and fuses q, k and v, and gate and up, into one
matrix each.

Source: transformers models/qwen3/modeling_qwen3.py; diffusers
Flux2KleinPipeline._get_qwen3_prompt_embeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcore.config import CONDITIONING_LAYERS, Qwen3Config
from fluxcore.kernels import Kernels, for_heads, for_prompts, narrow_linear, wide_linear
from fluxcore.models.rope import Rope, half_rope, rotate_halves


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32.

    Differs from transformers: the weight is applied before rounding to the output's
    dtype, not after, because that is one fused kernel on every device and one
    rounding fewer.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def grouped_heads(
    qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, heads: tuple[int, int], rope: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normed and turned, and values.

    Shapes: qkv [B, L, (heads + 2 kv) K]; heads of q and of k -> q [B, heads, L, K], k and v
    [B, kv, L, K].
    """
    q, k, v = qkv.unflatten(-1, (-1, len(q_norm.weight))).split((*heads, heads[1]), dim=2)
    q = rotate_halves(q_norm(q).transpose(1, 2), rope)  # [B, heads, L, K]
    k = rotate_halves(k_norm(k).transpose(1, 2), rope)  # [B, kv, L, K]
    return q, k, v.transpose(1, 2)


def projected(
    linear: nn.Module, x: Tensor, update: Tensor | None, norm: RMSNorm
) -> tuple[Tensor, Tensor]:
    """The residual stream with an update, and a projection of its norm.

    Shapes: x, update [B, L, D] -> [B, L, D], [B, L, M].
    """
    if update is not None:
        x = x + update
    return x, narrow_linear(norm(x), linear)


class Qwen3Attention(nn.Module):
    """Grouped-query attention with normed q and k.

    Shapes: qkv [B, L, (heads + 2 kv) K], as ``self.qkv`` gives it -> [B, L, D].
    """

    def __init__(self, config: Qwen3Config, kernels: Kernels) -> None:
        super().__init__()
        self.heads = (config.heads, config.kv_heads)
        self.attention = kernels.prompt_attention or kernels.attention
        self.grouped_heads = for_heads(config.head_width, kernels.grouped_heads, grouped_heads)
        all_heads = config.heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.width, all_heads * config.head_width, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps)
        self.k_norm = RMSNorm(config.head_width, config.norm_eps)
        self.out = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, qkv: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        return wide_linear(self.attended(qkv, rope, mask), self.out)

    def attended(self, qkv: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        """What ``self.out`` projects. Shapes: -> [B, L, heads K]."""
        q, k, v = self.grouped_heads(qkv, self.q_norm, self.k_norm, self.heads, rope)
        out = self.attention(q, k, v, mask)  # [B, heads, L, K]
        return out.transpose(1, 2).flatten(2)  # [B, L, heads K]


class Qwen3Layer(nn.Module):
    """One pre-norm layer: attention, then SwiGLU.

    Shapes: x [B, L, D] -> [B, L, D], in the dtype of the residual stream.
    """

    def __init__(self, config: Qwen3Config, kernels: Kernels) -> None:
        super().__init__()
        self.gated = kernels.gated
        self.projected = kernels.projected or projected
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Qwen3Attention(config, kernels)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        x, qkv = self.projected(self.attention.qkv, x, None, self.attention_norm)
        attended = self.attention(qkv, rope, mask)
        x, gate_up = self.projected(self.gate_up, x, attended, self.mlp_norm)  # [B, L, 2 mlp]
        return x + self.gated(self.down, gate_up)


class Qwen3Encoder(nn.Module):
    """Token ids to conditioning.

    Shapes: ids [B, L] int64, token_count [B] int64 -> [B, L, 3 D] in the dtype of the
    residual stream.
    """

    def __init__(self, config: Qwen3Config, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.kernels = replace(kernels, prompt_attention=for_prompts(config.head_width, kernels))
        self.embedding: nn.Module = _embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(
            Qwen3Layer(config, self.kernels) for _ in range(config.used_layers)
        )
        self.final_norm = RMSNorm(config.width, config.norm_eps) if config.final_norm else None
        # Another form of ``run_layers`` where their products are made for it.
        self.fused_layers: Callable[..., list[Tensor]] | None = None

    def forward(self, ids: Tensor, token_count: Tensor) -> Tensor:
        length = ids.shape[1]
        rope = half_rope(length, self.config.head_width, self.config.rope_theta, ids.device)
        x = self.embedding(ids)  # [B, L, D]
        rope = (rope[0].to(x.dtype), rope[1].to(x.dtype))
        mask = token_count
        if self.kernels.prompt_attention is None:
            mask = causal_mask(length, token_count)  # [B, 1, L, L]
        run = self.fused_layers or self.run_layers
        states = run(self.kernels.residual(x), rope, mask)
        if self.final_norm is not None:
            states[-1] = self.final_norm(states[-1])
        return torch.cat(states, dim=-1)  # [B, L, 3 D]

    def run_layers(self, x: Tensor, rope: Rope, mask: Tensor) -> list[Tensor]:
        """The states that the conditioning reads. Shapes: x [B, L, D] -> [B, L, D] each."""
        states = []
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, rope, mask)
            if number in CONDITIONING_LAYERS:
                states.append(x)
        return states


def _embedding(rows: int, width: int) -> nn.Embedding:
    """As PyTorch makes one, but for the start values of a tensor without memory.

    To draw those, on the meta device, it would import its compiler: 3 s of every start.
    """
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    made: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    return made


def causal_mask(length: int, token_count: Tensor) -> Tensor:
    """True where a query may see a key: not later, and not padding.

    Padded queries still see the real tokens before them, because the transformer
    attends to their outputs.

    Shapes: token_count [B] -> [B, 1, L, L] bool.
    """
    position = torch.arange(length, device=token_count.device)
    causal = position[:, None] >= position[None, :]  # [L, L]
    real = position[None, :] < token_count[:, None]  # [B, L]
    return (causal[None] & real[:, None, :])[:, None]  # [B, 1, L, L]
