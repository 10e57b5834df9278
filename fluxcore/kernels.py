"""What a device or a dtype does differently, as functions that the networks use.

Owns the signatures and the plain form of each, which is the reference for all
others; which form a device gets is decided in ``fluxcore.runtime``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_PROMPT_HEAD = 16
"""Width of heads that ``Kernels.prompt_attention`` takes; powers of two."""
LEAST_LARGEST = 1e-6
"""Rows of a float16 projection are scaled to a largest of 1, but for those below this."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, mask) -> out; q and out [B, H, L, K], k and v [B, H or fewer, L, K].

``mask`` is boolean, True where a key may be seen, or None; of ``Kernels.prompt_attention`` it is
the tokens of each prompt [B], of which none sees one behind it, nor padding. Fewer key heads than
query heads means grouped queries.
"""


Modulated = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor]
"""(linear, x, shift, factor, eps) -> as ``fluxcore.models.flux2.modulated``."""
JointHeads = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(streams, pe) -> as ``fluxcore.models.flux2.joint_heads``."""
GroupedHeads = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(qkv, q_norm, k_norm, heads, rope) -> as ``fluxcore.models.qwen3.grouped_heads``."""
Projected = Callable[..., tuple[Tensor, Tensor]]
"""(linear, x, update, norm) -> as ``fluxcore.models.qwen3.projected``."""
Normed = Callable[..., Tensor]
"""(x, norm, silu=True) -> as ``fluxcore.models.vae.normed``."""


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value; for float16 in float32, because the product passes float16's range."""
    if gate.dtype != torch.float16:
        return F.silu(gate) * value
    return F.silu(gate.float()) * value


def gated(hidden: Tensor, before: Tensor | None = None) -> Tensor:
    """SwiGLU of rows that hold gates, then values; behind other columns, where there are some.

    Shapes: hidden [..., 2 M], before [..., D] -> [..., D + M].
    """
    product = swiglu(*hidden.chunk(2, dim=-1))
    return product if before is None else torch.cat((before.to(product.dtype), product), dim=-1)


def narrow_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """A projection of normed rows, which are in the dtype of the residual stream.

    Shapes: x [..., N] -> [..., M] in the dtype of the weights.
    """
    if linear.weight.dtype == torch.float16:
        x = x.half()
    return linear(x)  # type: ignore[no-any-return]


def wide_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """A projection onto the residual stream, whose values may pass 65504.

    With float16 weights, each row is scaled to a largest of 1 before, and back in float32
    after. A matrix of 10**4 columns then stays below 65504 unless its weights average
    above 6, and what is lost is what float16 loses on any number.

    Shapes: x [..., N] -> [..., M], float32 if the weights are float16.
    """
    if linear.weight.dtype != torch.float16:
        return linear(x)  # type: ignore[no-any-return]
    largest = torch.linalg.vector_norm(
        x, math.inf, dim=-1, keepdim=True, dtype=torch.float32
    ).clamp_min(LEAST_LARGEST)  # [..., 1]
    return linear((x / largest).half()) * largest  # type: ignore[no-any-return]


def gated_linear(linear: nn.Module, hidden: Tensor, before: Tensor | None = None) -> Tensor:
    """The projection of ``gated`` rows onto the residual stream."""
    return wide_linear(gated(hidden, before), linear)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The parts of a network that are chosen per device.

    Attributes:
        attention: attention of the transformer and of the text encoder.
        vae_attention: attention of the VAE, one head as wide as the channels.
        residual_dtype: dtype of the residual streams of transformer and encoder;
            None keeps the dtype of the weights, as the references do.
        prompt_attention: of the text encoder, where it is one that makes its own masks.
        gated: (linear, hidden, before) -> the second layer of an MLP on ``gated`` rows.
        add_gated: (x, gate, y) -> x + gate * y, of the transformer's residual streams.
        modulated, joint_heads: of the transformer; None: its own plain form.
        grouped_heads, projected: of the text encoder, likewise.
        normed, residual_block: of the VAE, likewise.
    """

    attention: Attention
    vae_attention: Attention
    residual_dtype: torch.dtype | None = None
    prompt_attention: Attention | None = None
    gated: Callable[..., Tensor] = gated_linear
    add_gated: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.addcmul
    modulated: Modulated | None = None
    joint_heads: JointHeads | None = None
    grouped_heads: GroupedHeads | None = None
    projected: Projected | None = None
    normed: Normed | None = None
    residual_block: Callable[..., Tensor] | None = None

    def residual(self, x: Tensor) -> Tensor:
        return x if self.residual_dtype is None else x.to(self.residual_dtype)


def for_heads(
    width: int, kernel: Callable[..., Any] | None, plain: Callable[..., Any]
) -> Callable[..., Any]:
    """A kernel where there is one and it takes heads of that width: a power of two."""
    return plain if kernel is None or width & (width - 1) else kernel


def for_prompts(width: int, kernels: Kernels) -> Attention | None:
    """``prompt_attention`` where there is one and it takes heads of that width."""
    takes = width >= LEAST_PROMPT_HEAD and not width & (width - 1)
    return kernels.prompt_attention if takes else None


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention, whichever kernel it picks."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
