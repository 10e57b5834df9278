"""The text encoder's own kernels: attention over a prompt, and norms with what they are added to.

Owns what only the encoder needs, and the order of layers whose matrices are in fp8; heads are those
of ``fluxcore.runtime.triton_heads``, gates those of ``fluxcore.runtime.triton_kernels``.
A prompt is a few dozen tokens and padding up to 512, which nobody may see as a key: the keys that
are read end with the prompt, and queries in groups share theirs without copies. Each function has
the signature and the meaning of the plain form that it stands for.

Source: the plain forms in ``fluxcore.models.qwen3``; FlashAttention-2, arXiv 2307.08691 (the sums
of a softmax that is taken in pieces).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor, nn

from fluxcore.config import CONDITIONING_LAYERS
from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_addends import Addend, gated_product, rounded_product
from fluxcore.runtime.triton_kernels import FormedRows, Rope, RowNorm, launch, store_row

QUERIES, KEYS = 64, 64
"""That one program takes, and that it looks at at once."""


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, token_count: Tensor | None) -> Tensor:
    """Attention in which no token sees a later one, nor padding.

    Shapes: q [B, H, L, K], k and v [B, H or fewer, L, K], channels side by side; token_count [B],
    at least 1 each -> [B, H, L, K], token by token.
    """
    assert token_count is not None, "the text encoder's attention knows where the prompt ends"
    batch, heads, tokens, width = q.shape
    out = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    launch(
        _attend,
        (triton.cdiv(tokens, QUERIES), batch * heads),
        q,
        k,
        v,
        token_count,
        out,
        *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
        tokens,
        heads,
        heads // k.shape[1],
        width**-0.5 * math.log2(math.e),
        QUERIES,
        KEYS,
        width,
        num_warps=4,
        num_stages=2,
    )
    return out


def fits(encoder: Any) -> bool:
    """Whether all products onto the residual stream are in fp8 and can leave their scales out."""
    linears = [linear for layer in encoder.layers for linear in (layer.attention.out, layer.down)]
    return all(
        isinstance(linear, EightBitLinear) and linear.format.unscaled is not None
        for linear in linears
    )


class NarrowLayers:
    """The layers of an encoder, with each sum in the pass that norms it for the next product."""

    def __init__(self, encoder: Any) -> None:
        self.layers = list(encoder.layers)

    def __call__(self, x: Tensor, rope: Rope, mask: Tensor) -> list[Tensor]:
        """As ``Qwen3Encoder.run_layers``."""
        states: list[Tensor] = []
        update: Addend | None = None
        for number, layer in enumerate(self.layers):
            attention = layer.attention
            x, qkv = projected(attention.qkv, x, update, layer.attention_norm)
            if number in CONDITIONING_LAYERS:  # so many have been added up
                states.append(x)
            update = rounded_product(attention.out, attention.attended(qkv, rope, mask))
            x, gate_up = projected(layer.gate_up, x, update, layer.mlp_norm)  # [B, L, 2 mlp]
            update = gated_product(layer.down, gate_up)
        assert update is not None, "an encoder has layers"
        return [*states, x + update.whole()]


def projected(
    linear: nn.Module, x: Tensor, update: Tensor | Addend | None, norm: RowNorm
) -> tuple[Tensor, Tensor]:
    """As ``fluxcore.models.qwen3.projected``."""
    x = x.contiguous()
    width = x.shape[-1]
    total = x if update is None else x.new_empty(x.shape)
    rows = FormedRows.made(linear, x, width)
    added = update if isinstance(update, Addend) else Addend(x if update is None else update)
    launch(
        _add_and_norm,
        (x.numel() // width,),
        x,
        added.values.contiguous(),
        *(added.scales or (x, x)),
        norm.weight,
        total,
        rows.values,
        rows.scales,
        width,
        norm.eps,
        *rows.rounding,
        update is not None,
        added.scales is not None,
        triton.next_power_of_2(width),
        num_warps=4,
    )
    return total, rows.times(linear, x)


@triton.jit
def _attend(
    q,
    k,
    v,
    token_count,
    out,
    q_item,
    q_head,
    q_row,
    k_item,
    k_head,
    k_row,
    v_item,
    v_head,
    v_row,
    out_item,
    out_head,
    out_row,
    tokens,
    heads,
    group,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some queries of one head. The scale is that of powers of two."""
    first = tl.program_id(0) * BM
    item, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    queries = first + tl.arange(0, BM)
    channel = tl.arange(0, WIDTH)[None, :]
    inside = queries[:, None] < tokens
    from_q = q + item * q_item + head * q_head + queries[:, None] * q_row + channel
    rows = tl.load(from_q, mask=inside, other=0.0)
    of_keys = k + item * k_item + head // group * k_head + channel
    of_values = v + item * v_item + head // group * v_head + channel
    count = tl.load(token_count + item).to(tl.int32)
    most = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    summed = tl.zeros((BM, WIDTH), tl.float32)
    for start in range(0, tl.minimum(first + BM, count), BN):
        keys = start + tl.arange(0, BN)
        within = keys[:, None] < count
        columns = tl.load(of_keys + keys[:, None] * k_row, mask=within, other=0.0)
        scores = tl.dot(rows, columns.T) * scale
        seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] < count)
        scores = tl.where(seen, scores, -1e30)
        highest = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        kept = tl.exp2(most - highest)
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(of_values + keys[:, None] * v_row, mask=within, other=0.0)
        summed = tl.dot(weights.to(values.dtype), values, summed * kept[:, None])
        most = highest
    place = out + item * out_item + head * out_head + queries[:, None] * out_row + channel
    tl.store(place, (summed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_and_norm(
    x,
    update,
    rows,
    columns,
    weight,
    total,
    out,
    scales,
    width,
    eps,
    largest,
    smallest,
    ROUND: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row with what is added to it, and its norm; rounded for an fp8 layer."""
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(update + row + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            added *= tl.load(columns + at, mask=inside, other=0.0)
            added *= tl.load(rows + tl.program_id(0))
        values += added
        # Normed as it is written, so that it is the same as in two kernels.
        narrow = values.to(total.dtype.element_ty)
        tl.store(total + row + at, narrow, mask=inside)
        values = narrow.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    normed = values * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    store_row(normed, out, scales, width, largest, smallest, ROUND, BLOCK)
