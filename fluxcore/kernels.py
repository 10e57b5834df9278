"""What a device may do differently, as functions that are handed to the networks.

Owns the signatures and the plain form of each, which is the reference for all
others; which form a device gets is decided in ``fluxcore.runtime``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, mask) -> out; q and out [B, H, L, K], k and v [B, H or fewer, L, K].

``mask`` is boolean, True where a key may be seen, or None. Fewer key heads than
query heads means grouped queries.
"""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The parts of a network that are chosen per device.

    Attributes:
        attention: attention of the transformer and of the text encoder.
        vae_attention: attention of the VAE, one head as wide as the channels.
        residual_dtype: dtype of the residual streams of transformer and encoder;
            None keeps the dtype of the weights, as the references do.
    """

    attention: Attention
    vae_attention: Attention
    residual_dtype: torch.dtype | None = None

    def residual(self, x: Tensor) -> Tensor:
        return x if self.residual_dtype is None else x.to(self.residual_dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention, whichever kernel it picks."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
