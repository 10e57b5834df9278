"""Queries and keys, normed and turned, as Triton kernels: one pass over memory.

Owns the heads of the transformer, whose neighbouring channels turn together, and those of the text
encoder, whose halves do. Each function has the signature and the meaning of the plain form that it
stands for, in ``fluxcore.models``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from fluxcore.runtime.triton_kernels import Rope, RowNorm, evenly, launch

MOST_HEADS = 8
"""Heads of one token that one program turns."""


class JointNorm(RowNorm, Protocol):
    """RMS norms of q and of k in one."""

    heads: int


@triton.jit
def _partners(row, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Channels that turn together: neighbours, or one of each half. Shapes: [H, K / 2] each."""
    if NEIGHBOURS:
        both = tl.load(row + tl.arange(0, WIDTH)[None, :]).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], WIDTH // 2, 2)))
    else:
        channel = tl.arange(0, WIDTH // 2)[None, :]
        first = tl.load(row + channel).to(tl.float32)
        second = tl.load(row + WIDTH // 2 + channel).to(tl.float32)
    return first, second


@triton.jit
def _turn(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    out,
    row_stride,
    tokens,
    first,
    joint,
    q_heads,
    turned_heads,
    out_heads,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    row, group = tl.program_id(0), tl.program_id(1)
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    position = first + row % tokens
    target = ((row // tokens) * joint + position).to(tl.int64) * (out_heads * WIDTH)
    source = qkv + row.to(tl.int64) * row_stride + head * WIDTH
    place = out + target + head * WIDTH
    channel = tl.arange(0, WIDTH)[None, :]
    if group * HEADS >= turned_heads:  # v
        tl.store(place + channel, tl.load(source + channel))
    else:
        weight = q_weight if group * HEADS < q_heads else k_weight
        one, other = _partners(source, WIDTH, NEIGHBOURS)
        squares = tl.sum(one * one, 1) + tl.sum(other * other, 1)
        scale = 1 / tl.sqrt(squares / WIDTH + eps)[:, None]
        of_one, of_other = _partners(weight, WIDTH, NEIGHBOURS)
        one *= scale * of_one
        other *= scale * of_other
        # The sines of the halves come without a sign, of neighbours the first one's is turned.
        c, _ = _partners(cos + position * WIDTH, WIDTH, NEIGHBOURS)
        _, s = _partners(sin + position * WIDTH, WIDTH, NEIGHBOURS)
        turned_one = (one * c - other * s).to(out.dtype.element_ty)
        turned_other = (other * c + one * s).to(out.dtype.element_ty)
        if NEIGHBOURS:
            turned = tl.reshape(tl.join(turned_one, turned_other), (HEADS, WIDTH))
            tl.store(place + channel, turned)
        else:
            half = tl.arange(0, WIDTH // 2)[None, :]
            tl.store(place + half, turned_one)
            tl.store(place + WIDTH // 2 + half, turned_other)


def _turned(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor],
    rope: Rope,
    out: Tensor,
    heads: tuple[int, int],
    eps: float,
    *,
    first: int = 0,
    neighbours: bool = True,
) -> None:
    """Norm and turn q and k of some tokens; v is copied where ``out`` has room for it.

    Shapes: qkv [B, L, heads of q, k and v, each K wide], rows of any stride; out [B, L_joint,
    heads of q and k, or of all, K], of which tokens ``first`` to ``first + L`` are written; heads
    of q and of k.
    """
    qkv = evenly(qkv)
    batch, tokens, _ = qkv.shape
    _, joint, out_heads, width = out.shape
    size = math.gcd(*heads, MOST_HEADS)
    launch(
        _turn,
        (batch * tokens, out_heads // size),
        qkv,
        *weights,
        *rope,
        out,
        qkv.stride(1),
        tokens,
        first,
        joint,
        heads[0],
        sum(heads),
        out_heads,
        eps,
        size,
        width,
        neighbours,
        num_warps=1,
    )


def joint_heads(
    streams: Sequence[tuple[Tensor, JointNorm]], pe: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fluxcore.models.flux2.joint_heads``; q, k and v lie token by token."""
    norm = streams[0][1]
    heads, width = norm.heads, len(norm.weight) // 2
    first_rows = streams[0][0]
    alone = len(streams) == 1
    tokens = sum(rows.shape[1] for rows, _ in streams)
    shape = (len(first_rows), tokens, 2 if alone else 3, heads, width)
    out = first_rows.new_empty(shape)
    first = 0
    for rows, norm in streams:
        weights = (norm.weight[:width], norm.weight[width:])
        _turned(rows, weights, pe, out.flatten(2, 3), (heads, heads), norm.eps, first=first)
        first += rows.shape[1]
    q, k = out[:, :, 0].transpose(1, 2), out[:, :, 1].transpose(1, 2)  # [B, H, L, K]
    if not alone:
        return q, k, out[:, :, 2].transpose(1, 2)
    v = first_rows.unflatten(-1, (3, heads, width))[:, :, 2]
    return q, k, v.transpose(1, 2)


def grouped_heads(
    qkv: Tensor, q_norm: RowNorm, k_norm: RowNorm, heads: tuple[int, int], rope: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fluxcore.models.qwen3.grouped_heads``; q and k lie token by token."""
    width = len(q_norm.weight)
    out = qkv.new_empty((*qkv.shape[:2], sum(heads), width))
    _turned(qkv, (q_norm.weight, k_norm.weight), rope, out, heads, q_norm.eps, neighbours=False)
    v = qkv.unflatten(-1, (-1, width))[:, :, sum(heads) :]
    q, k = out.split(heads, dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
