"""The transformer's blocks, made of products that finish their results.

Owns what a block adds, and the order in which the blocks' weights lie. The product before a double
block's attention and the first of its MLP are one launch each for both streams.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fluxcore.config import TEXT_TOKENS
from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_addends import Addend
from fluxcore.runtime.triton_attention import attend, is_short
from fluxcore.runtime.triton_kernels import FormedRows, Rope, launch
from fluxcore.runtime.triton_loop import BlockLoop
from fluxcore.runtime.triton_products import COLUMNS, HEAD_WIDTH, ROWS, Heads, half_tables, multiply

FEW_ROWS = 2048
"""Up to so many, q, k, v and the MLP of a single block are one product; of more, two are faster."""


class DoubleBlock(Protocol):
    attention: Any
    txt: Any
    img: Any


class SingleBlock(Protocol):
    sizes: tuple[int, int]
    qkv_mlp: nn.Linear
    qk_norm: Any
    out: nn.Linear
    attention: Any


class JointWeights(NamedTuple):
    """Of both streams, those of the text first. Shapes: [2 * 3 D, D], [2 * 2 M, D], [2 * 2 K]."""

    qkv: Tensor
    mlp_in: Tensor
    norm: Tensor


def fits(transformer: Any) -> bool:
    """Whether the tiles divide all matrices of the blocks, none of which is in eight bits."""
    linears = [block.qkv_mlp for block in transformer.single_blocks]
    for block in transformer.double_blocks:
        for stream in (block.txt, block.img):
            linears += [stream.qkv, stream.mlp_in]
    config = transformer.config
    is_plain = not any(isinstance(linear, EightBitLinear) for linear in linears)
    is_even = config.width % COLUMNS == 2 * config.mlp_width % COLUMNS == TEXT_TOKENS % ROWS == 0
    return is_plain and is_even and config.head_width == HEAD_WIDTH


class FusedBlocks(BlockLoop):
    """The blocks of a transformer, whose weights it lays out anew, in place.

    Gates and values of an MLP lie in turns, so that a tile holds both; what text and image are
    multiplied with lies on end.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        self._weights = [joined_weights(block) for block in self.double]
        for block in self.single:
            put_in_turns(block.qkv_mlp.weight.data[block.sizes[0] :])

    def tables(self, pe: Rope) -> Rope:
        return half_tables(pe)

    def attended(self, number: int, rows: FormedRows, pe: Rope, split: int) -> tuple[Addend, ...]:
        return _attended(self.double[number], self._weights[number], rows.values, pe, split)

    def gated(self, number: int, rows: FormedRows, split: int) -> tuple[Addend, ...]:
        return _gated(self.double[number], self._weights[number], rows.values, split)

    def updates(self, block: SingleBlock, rows: FormedRows, pe: Rope, kept: slice | None) -> Addend:
        return _updates(block, rows.values, pe, kept)


def put_in_turns(rows: Tensor) -> None:
    """Gates, then values, to halves of a tile of each in turns. Shapes: [2 M, D]."""
    gates, values = (part.unflatten(0, (-1, COLUMNS // 2)) for part in rows.chunk(2))
    rows.copy_(torch.stack((gates, values), dim=1).flatten(0, 2))


def joined_weights(block: DoubleBlock) -> JointWeights:
    """Weights of both streams on end; the block's own become views of them."""
    streams = (block.txt, block.img)
    for stream in streams:
        put_in_turns(stream.mlp_in.weight.data)
    joined = []
    for layer in ("qkv", "mlp_in", "qk_norm"):
        weights = [getattr(stream, layer).weight for stream in streams]
        both = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, both.chunk(2), strict=True):
            weight.data = part
        joined.append(both)
    if both.device.type == "cuda":
        # What held them is of no size that anything else would use.
        torch.cuda.empty_cache()
    return JointWeights(*joined)


def _attended(
    block: DoubleBlock, weights: JointWeights, rows: Tensor, turns: Rope, split: int
) -> tuple[Addend, ...]:
    """What attention adds to each stream. Shapes: rows [B, L, D], modulated -> [B, L_i, D]."""
    norm = block.txt.qk_norm
    heads = rows.new_empty((*rows.shape[:2], 3 * rows.shape[-1]))
    multiply(rows, weights.qkv, Heads(heads, weights.norm, norm.eps, turns), first=split)
    if is_short(heads):
        attended = torch.empty_like(rows)
        attend(heads, attended)
    else:
        attended = block.attention(*heads_of(heads), None)  # [B, H, L, K]
        attended = attended.transpose(1, 2).flatten(2)  # [B, L, D]
    return Addend(block.txt.out(attended[:, :split])), Addend(block.img.out(attended[:, split:]))


def _gated(
    block: DoubleBlock, weights: JointWeights, rows: Tensor, split: int
) -> tuple[Addend, ...]:
    """What the MLPs add. Shapes: rows [B, L, D], modulated -> [B, L_i, D] of each stream."""
    gated = rows.new_empty((*rows.shape[:2], len(weights.mlp_in) // 4))
    multiply(rows, weights.mlp_in, gated=gated, first=split)
    of_txt, of_img = gated[:, :split], gated[:, split:]
    return Addend(block.txt.mlp_out(of_txt)), Addend(block.img.mlp_out(of_img))


def _updates(block: SingleBlock, rows: Tensor, turns: Rope, kept: slice | None) -> Addend:
    """What a block adds, before its gate. Shapes: rows [B, L, D], modulated -> [B, L_kept, D].

    Args:
        kept: the rows that are asked for; None: all.
    """
    heads, joined = projected(block, rows, turns, kept)
    if is_short(heads):
        attend(heads, joined, 0 if kept is None else kept.start)
    else:
        q, k, v = heads_of(heads)
        q = q if kept is None else q[:, :, kept]
        _put_before(joined, block.attention(q, k, v, None))  # [B, H, L_kept, K]
    return Addend(block.out(joined))


def _put_before(joined: Tensor, attended: Tensor) -> None:
    """Into the first columns. Shapes: joined [B, L, H K + M], attended [B, H, L, K]."""
    attended = attended.transpose(1, 2)  # [B, L, H, K]
    if not attended[0, 0].is_contiguous():
        attended = attended.contiguous()
    _, tokens, heads, _ = attended.shape
    width = heads * HEAD_WIDTH
    launch(
        _copy_columns,
        (joined.shape[:2].numel(),),
        attended,
        joined,
        attended.stride(0),
        attended.stride(1),
        joined.shape[-1],
        tokens,
        width,
        triton.next_power_of_2(width),
        num_warps=4,
    )


def projected(
    block: SingleBlock, rows: Tensor, turns: Rope, kept: slice | None = None
) -> tuple[Tensor, Tensor]:
    """Heads and gated MLP of modulated rows.

    Shapes: rows [B, L, D], turns as ``half_tables`` gives them -> heads [B, L, 3 H K]; joined
    [B, L_kept, D + M], whose first D columns are left open for what attention gives.
    """
    batch, tokens, width = rows.shape
    qkv_columns, mlp_columns = block.sizes
    out = rows.new_empty((batch, tokens, qkv_columns))
    heads = Heads(out, block.qk_norm.weight, block.qk_norm.eps, turns)
    of_mlp = rows if kept is None else rows[:, kept].contiguous()
    joined = rows.new_empty((*of_mlp.shape[:2], width + mlp_columns // 2))
    weight = block.qkv_mlp.weight
    if kept is None and batch * tokens <= FEW_ROWS:
        multiply(rows, weight, heads, joined)
    else:
        multiply(rows, weight[:qkv_columns], heads)
        multiply(of_mlp, weight[qkv_columns:], gated=joined)
    return out, joined


def heads_of(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes: [B, L, 3 H K] -> q, k and v [B, H, L, K]."""
    q, k, v = out.unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
    return q, k, v


@triton.jit
def _copy_columns(source, target, of_item, of_line, stride, tokens, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    place = source + row // tokens * of_item + row % tokens * of_line + at
    tl.store(target + row * stride + at, tl.load(place, mask=at < width), mask=at < width)
