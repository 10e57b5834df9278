"""Attention of few tokens, written to where the next product reads it.

Owns the kernel and for how many tokens it is about as fast as cuDNN's: as many as all of the chip's
units take at once. Beyond, cuDNN's is faster, but gives a tensor of its own, which has to be
copied, and clears some memory first. Made for NVIDIA's Hopper, whose copy engine it uses. The plain
form is ``fluxcore.kernels.plain_attention``.

Source: FlashAttention-2, arXiv 2307.08691 (the sums of a softmax that is taken in pieces).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fluxcore.runtime.triton_products import HEAD_WIDTH, processors

QUERIES, KEYS = 64, 32
"""That one program takes, and that it looks at at once."""
OPTIONS = {"num_warps": 4, "num_stages": 3}
PROGRAMS = 3
"""That one of the chip's units has memory for."""


def is_short(heads: Tensor) -> bool:
    """Whether all queries of one picture are taken at once. Shapes: as ``attend`` takes them.

    The same for any number of pictures, so that each is the same bit for bit beside others.
    """
    _, tokens, columns = heads.shape
    programs: int = triton.cdiv(tokens, QUERIES) * (columns // (3 * HEAD_WIDTH))
    return programs <= PROGRAMS * processors(heads.device)


def attend(heads: Tensor, out: Tensor, first: int = 0) -> None:
    """Attention of all tokens from the first one asked for, into the first columns of some rows.

    Shapes: heads [B, L, 3 H K], q, k and v; out [B, L_kept, H K or more], contiguous.

    Args:
        first: of the tokens whose rows are asked for.
    """
    batch, tokens, columns = heads.shape
    count = columns // (3 * HEAD_WIDTH)
    kept = out.shape[1]
    described = TensorDescriptor.from_tensor
    with torch.cuda.device_of(heads):
        _attend_few[(triton.cdiv(kept, QUERIES), batch * count)](
            described(heads, [1, QUERIES, HEAD_WIDTH]),
            described(heads, [1, KEYS, HEAD_WIDTH]),
            out,
            tokens,
            first,
            kept,
            count,
            out.shape[-1],
            HEAD_WIDTH**-0.5 * math.log2(math.e),
            BM=QUERIES,
            BN=KEYS,
            WIDTH=HEAD_WIDTH,
            **OPTIONS,
        )


@triton.jit
def _looked_at(
    rows,
    of_keys,
    item,
    start,
    tokens,
    k_at,
    v_at,
    scale,
    most,
    total,
    summed,
    IS_LAST: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some more keys. The scale is that of powers of two."""
    keys = tl.reshape(of_keys.load([item, start, k_at]), (BN, WIDTH))
    scores = tl.dot(rows, keys.T) * scale
    if IS_LAST:
        scores = tl.where((start + tl.arange(0, BN))[None, :] < tokens, scores, -1e30)
    highest = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    kept = tl.exp2(most - highest)
    total = total * kept + tl.sum(weights, 1)
    values = tl.reshape(of_keys.load([item, start, v_at]), (BN, WIDTH))
    summed = tl.dot(weights.to(values.dtype), values, summed * kept[:, None])
    return highest, total, summed


@triton.jit(do_not_specialize=["first"])
def _attend_few(
    of_queries,
    of_keys,
    out,
    tokens,
    first,
    kept,
    heads,
    out_stride,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0) * BM
    item, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    k_at, v_at = (heads + head) * WIDTH, (2 * heads + head) * WIDTH
    rows = tl.reshape(of_queries.load([item, first + line, head * WIDTH]), (BM, WIDTH))
    most = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    summed = tl.zeros((BM, WIDTH), tl.float32)
    whole = tokens // BN * BN
    for start in range(0, whole, BN):
        most, total, summed = _looked_at(
            rows,
            of_keys,
            item,
            start,
            tokens,
            k_at,
            v_at,
            scale,
            most,
            total,
            summed,
            False,
            BN,
            WIDTH,
        )
    if whole < tokens:
        most, total, summed = _looked_at(
            rows,
            of_keys,
            item,
            whole,
            tokens,
            k_at,
            v_at,
            scale,
            most,
            total,
            summed,
            True,
            BN,
            WIDTH,
        )
    lines = line + tl.arange(0, BM)
    place = (item.to(tl.int64) * kept + lines[:, None]) * out_stride + head * WIDTH
    place = out + place + tl.arange(0, WIDTH)[None, :]
    tl.store(place, (summed / total[:, None]).to(out.dtype.element_ty), mask=lines[:, None] < kept)
