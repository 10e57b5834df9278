"""Forms of attention for devices on which PyTorch's own choice is not the best.

Each takes the signature of ``fluxcore.kernels.Attention``; the plain form
there is the reference for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxcore.kernels import plain_attention

CHUNK_ROWS = 2048


def contiguous_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """For MPS: its fast kernel wants contiguous q, k and v, with as many heads each."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return plain_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """For MPS and wide heads: no fast kernel, so the scores are written out.

    Taking the queries in chunks keeps them at 2048 x L elements. Every query's
    softmax is its own, so chunking changes no value but by rounding.

    Shapes: q, k, v [B, H, L, K] -> [B, H, L, K]. ``mask`` must be None.
    """
    assert mask is None, "chunked attention takes no mask"
    k, v = k.contiguous(), v.contiguous()
    chunks = [plain_attention(rows.contiguous(), k, v, None) for rows in q.split(CHUNK_ROWS, dim=2)]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
