"""Matrix products of the single blocks whose results are finished before they reach memory.

Owns the kernel, the loop over the single blocks that is made of it, and the order in which it reads
their weights. Queries and keys are normed and turned, and gates multiplied with their values, in
the registers that hold a tile of the product: neither is written and read again, and the product
keeps all of the chip busy where the library's, at few rows, does not. The plain form is
``fluxcore.models.flux2.single_blocks``. Made for NVIDIA's Hopper, whose copy engine it uses.

Source of the idea: Triton's tutorial "Persistent Matmul" (programs that stay and take tiles in
turns, tiles in groups that share what the cache holds, an epilogue in halves).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_kernels import Rope, add_gated, launch, modulated

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""Of a tile of the product, and of what is added to it at once."""
HEAD_WIDTH = 128
FEW_ROWS = 2048
"""Up to so many, q, k, v and the MLP are one product; of more rows, two are faster."""
OPTIONS = {"num_warps": 8, "num_stages": 3}


class Norm(Protocol):
    """Of queries and keys, each over one head; the weight is of both."""

    weight: Tensor
    eps: float
    heads: int


class Block(Protocol):
    """A single block of the transformer."""

    eps: float
    sizes: tuple[int, int]
    qkv_mlp: nn.Linear
    qk_norm: Any
    out: nn.Linear
    attention: Any


def fits(block: Block) -> bool:
    """Whether the kernel's tiles divide the block's matrices, and these are not in eight bits."""
    qkv, mlp = block.sizes
    width = qkv // 3
    is_plain = not isinstance(block.qkv_mlp, EightBitLinear)
    is_even = width % COLUMNS == 0 and mlp % COLUMNS == 0
    return is_plain and is_even and width == block.qk_norm.heads * HEAD_WIDTH


def arrange(block: Block) -> None:
    """Put the rows of the MLP's gates and values in turns, in place: a tile holds both."""
    half = COLUMNS // 2
    rows = block.qkv_mlp.weight.data[block.sizes[0] :]
    gates, values = (part.unflatten(0, (-1, half)) for part in rows.chunk(2))
    rows.copy_(torch.stack((gates, values), dim=1).flatten(0, 2))


def single_blocks(blocks: Iterable[Block], x: Tensor, mod: Tensor, pe: Rope) -> Tensor:
    """As ``fluxcore.models.flux2.single_blocks``, for blocks that were arranged.

    Each block's sum is written together with its norm for the next.
    """
    shift, factor, gate = mod
    assert gate.numel() == x.shape[-1], "all rows share one noise level"
    blocks = list(blocks)
    rows = modulated(nn.Identity(), x, shift, factor, blocks[0].eps)
    turns = half_tables(pe)
    for block, following in pairwise(blocks):
        y = _updates(block, rows, turns)
        x, rows = _added_and_modulated(x, gate, y, shift, factor, following.eps)
    return add_gated(x, gate, _updates(blocks[-1], rows, turns))


def _updates(block: Block, rows: Tensor, turns: Rope) -> Tensor:
    """What a block adds, before its gate. Shapes: rows [B, L, D], modulated -> [B, L, D]."""
    q, k, v, joined = projected(block, rows, turns)
    attended = block.attention(q, k, v, None)  # [B, H, L, K]
    before = joined[..., : rows.shape[-1]].unflatten(-1, (block.qk_norm.heads, HEAD_WIDTH))
    before.copy_(attended.transpose(1, 2))
    return block.out(joined)  # type: ignore[no-any-return]


def half_tables(pe: Rope) -> Rope:
    """Cosines and sines with one value for each pair of channels, so that they load side by side.

    Of each pair the first sine of the model's tables has its sign turned round.

    Shapes: each [L, K] -> [L, K / 2].
    """
    return pe[0][:, ::2].contiguous(), pe[1][:, 1::2].contiguous()


def projected(block: Block, rows: Tensor, turns: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads and gated MLP of modulated rows.

    Shapes: rows [B, L, D], turns as ``half_tables`` gives them -> q, k and v [B, H, L, K];
    joined [B, L, D + M], whose first D columns are left open for what attention gives.
    """
    batch, tokens, width = rows.shape
    qkv_columns, mlp_columns = block.sizes
    heads = rows.new_empty((batch, tokens, 3, block.qk_norm.heads, HEAD_WIDTH))
    joined = rows.new_empty((batch, tokens, width + mlp_columns // 2))
    weight = block.qkv_mlp.weight
    if batch * tokens <= FEW_ROWS:
        _multiply(rows, weight, block.qk_norm, turns, heads, joined, qkv_columns)
    else:
        _multiply(rows, weight[:qkv_columns], block.qk_norm, turns, heads, joined, qkv_columns)
        _multiply(rows, weight[qkv_columns:], block.qk_norm, turns, heads, joined, 0)
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B, H, L, K]
    return q, k, v, joined


def _multiply(
    rows: Tensor, weight: Tensor, norm: Norm, turns: Rope, heads: Tensor, joined: Tensor, qkv: int
) -> None:
    """One product; columns up to ``qkv`` go to heads, those behind them to joined."""
    batch, tokens, width = rows.shape
    count = batch * tokens
    gates = len(weight) > qkv
    tiles = triton.cdiv(count, ROWS) * (len(weight) // COLUMNS)
    processors = _processors(rows.device)
    programs = min(tiles, processors)
    described = TensorDescriptor.from_tensor
    with torch.cuda.device_of(rows):
        _project[(programs,)](
            described(rows.view(count, width), [ROWS, DEPTH]),
            described(weight, [COLUMNS, DEPTH]),
            described(heads.view(count, -1), [ROWS, HEAD_WIDTH]),
            described(joined.view(count, -1), [ROWS, COLUMNS // 2]),
            norm.weight,
            *turns,
            count,
            tokens,
            len(weight),
            width,
            norm.eps,
            qkv,
            programs,
            HEADS=qkv > 0,
            GATES=gates,
            BM=ROWS,
            BN=COLUMNS,
            BK=DEPTH,
            GROUP=8 if gates else 16,
            # Loads that run on from tile to tile: not where a tile ends in one of two ways.
            FLATTEN=qkv == 0,
            **OPTIONS,
        )


def _processors(device: torch.device) -> int:
    """Each runs one program. Where kernels are interpreted there are none to count."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; those of a group of rows come one after the other."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    size = min(tiles_m - first, GROUP)
    inside = tile % per_group
    return first + inside % size, inside // size


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right columns, of which each thread holds some of both."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _turned(head, weight, cos, sin, row, count, tokens, eps, BM: tl.constexpr):
    """RMS norm and rotation of one head of some rows. Neighbouring channels turn together."""
    scale = 1 / tl.sqrt(tl.sum(head * head, 1) / 128 + eps)[:, None]
    even, odd = tl.split(tl.reshape(head, (BM, 64, 2)))
    pair = tl.arange(0, 64)
    even = even * scale * tl.load(weight + 2 * pair).to(tl.float32)[None, :]
    odd = odd * scale * tl.load(weight + 2 * pair + 1).to(tl.float32)[None, :]
    rows = row + tl.arange(0, BM)
    place = (rows % tokens)[:, None] * 64 + pair[None, :]
    inside = rows[:, None] < count
    c = tl.load(cos + place, mask=inside, other=0.0)
    s = tl.load(sin + place, mask=inside, other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BM, 128))


@triton.jit
def _store_heads(
    tile,
    column,
    heads,
    weight,
    cos,
    sin,
    row,
    count,
    tokens,
    eps,
    TURN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    left, right = _halves(tile, BM, BN)
    if TURN:
        left = _turned(left, weight, cos, sin, row, count, tokens, eps, BM)
    heads.store([row, column], left.to(tl.bfloat16))
    if TURN:
        right = _turned(right, weight, cos, sin, row, count, tokens, eps, BM)
    heads.store([row, column + BN // 2], right.to(tl.bfloat16))


@triton.jit
def _store_gated(tile, joined, row, column, BM: tl.constexpr, BN: tl.constexpr):
    gate, value = _halves(tile, BM, BN)
    joined.store([row, column], (gate / (1 + tl.exp(-gate)) * value).to(tl.bfloat16))


@triton.jit(do_not_specialize=["count", "tokens", "programs"])
def _project(
    x,
    w,
    heads,
    joined,
    weight,
    cos,
    sin,
    count,
    tokens,
    columns,
    width,
    eps,
    qkv,
    programs,
    HEADS: tl.constexpr,
    GATES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Rows [count, width] times w [columns, width] transposed; programs take tiles in turns."""
    tiles_m, tiles_n = tl.cdiv(count, BM), columns // BN
    steps = width // BK
    done = tl.program_id(0) - programs  # counted apart, so that loads may run ahead of stores
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
        at_m, at_n = _place(tile, tiles_m, tiles_n, GROUP)
        product = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            these = x.load([at_m * BM, step * BK])
            product = tl.dot(these, w.load([at_n * BN, step * BK]).T, product)
        done += programs
        at_m, at_n = _place(done, tiles_m, tiles_n, GROUP)
        row, column = at_m * BM, at_n * BN
        if not HEADS:
            _store_gated(product, joined, row, width + column // 2, BM, BN)
        elif column < 2 * width:
            own = weight + 128 * (column >= width).to(tl.int32)
            _store_heads(
                product, column, heads, own, cos, sin, row, count, tokens, eps, True, BM, BN
            )
        elif not GATES or column < qkv:
            _store_heads(
                product, column, heads, weight, cos, sin, row, count, tokens, eps, False, BM, BN
            )
        else:
            _store_gated(product, joined, row, width + (column - qkv) // 2, BM, BN)


@triton.jit
def _add_and_modulate(x, gate, y, shift, factor, total, rows, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    added = tl.load(y + row + at, mask=inside, other=0.0).to(tl.float32)
    added *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    # Normed as it is written, so that it is the same as in two kernels.
    narrow = added.to(total.dtype.element_ty)
    tl.store(total + row + at, narrow, mask=inside)
    values = narrow.to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scaled = normed * tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
    moved = scaled + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + row + at, moved.to(rows.dtype.element_ty), mask=inside)


def _added_and_modulated(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and that modulated. Shapes: x and y [B, L, D], contiguous; vectors D."""
    width = x.shape[-1]
    total, rows = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    grid = (x.numel() // width,)
    args = (x, gate, y, shift, factor, total, rows, width, eps, block)
    launch(_add_and_modulate, grid, *args, num_warps=4)
    return total, rows
