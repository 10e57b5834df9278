"""Forms of attention for devices on which PyTorch's own choice is not the best.

Each takes the signature of ``fluxcore.kernels.Attention``; the plain form
there is the reference for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxcore.kernels import plain_attention

CHUNK_ROWS = 2048
SCORED_ROWS = 4096
CUDNN_HEAD_WIDTH = 128


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


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """For CUDA from Hopper on: cuDNN's kernel, about twice as fast as flash there.

    With a mask, as in the text encoder, or on heads that it does not take, PyTorch chooses;
    none of its fast kernels takes a mask with fewer key heads than query heads.
    """
    if mask is None and q.shape[-1] <= CUDNN_HEAD_WIDTH and q.shape[-1] % 8 == 0:
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        attended: Tensor = attend(q, k, v, None, False)[0]
        return attended
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return plain_attention(q, k, v, mask)


def scored(q: Tensor, k: Tensor) -> Tensor:
    """Scores in float32, not scaled. Shapes: q [B, L_q, K], k [B, L, K] -> [B, L_q, L]."""
    return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)


@torch.library.custom_op("fluxd::scored_attention", mutates_args=())
def scored_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For CUDA and wide heads, of which no fast kernel takes 512: two matrix products.

    The scores are kept in float32, as the fused kernels keep them, and written out for 4096
    queries at a time. A compiler sees it as one operation: the number of chunks depends on
    the size.

    Shapes: q, k, v [B, H, L, K] -> [B, H, L, K].
    """
    heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B H, L, K]
    scale = q.shape[-1] ** -0.5
    chunks = []
    for rows in q.split(SCORED_ROWS, dim=1):
        weights = scored(rows, k).mul_(scale).softmax(dim=-1).to(v.dtype)  # [B H, rows, L]
        chunks.append(torch.bmm(weights, v))
    out = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)  # [B H, L, K]
    return out.view(*heads, *out.shape[1:])


@scored_attention.register_fake
def _scored_attention_shape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def wide_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``scored_attention`` in the form of the others. ``mask`` must be None."""
    assert mask is None, "attention of wide heads takes no mask"
    attended: Tensor = scored_attention(q, k, v)
    return attended
