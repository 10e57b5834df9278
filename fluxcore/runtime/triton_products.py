"""Matrix products whose results are finished before they reach memory.

Owns the kernel and how its tiles are laid over the rows. Queries and keys are normed and turned,
and gates multiplied with their values, in the registers that hold a tile of the product: neither is
written and read again. Rows of the two streams of a double block are multiplied in one launch, each
with its stream's weights, so that few rows of each keep all of the chip busy, too. What is made of
it is in ``fluxcore.runtime.triton_blocks``. Made for NVIDIA's Hopper, whose copy engine it uses.

Source of the idea: Triton's tutorial "Persistent Matmul" (programs that stay and take tiles in
turns, tiles in groups that share what the cache holds, an epilogue in halves).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fluxcore.runtime.triton_kernels import Rope

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""Of a tile of the product, and of what is added to it at once."""
HEAD_WIDTH = 128
OPTIONS = {"num_warps": 8, "num_stages": 3}


class Heads(NamedTuple):
    """Where queries, keys and values go, and what q and k go through before.

    Attributes:
        out: [B, L, 3 H K], contiguous.
        weight: of the norms of q and of k on end, [2 K], or those of both streams, [2 * 2 K].
        turns: as ``half_tables`` gives them, each [L, K / 2].
    """

    out: Tensor
    weight: Tensor
    eps: float
    turns: Rope


def half_tables(pe: Rope) -> Rope:
    """Cosines and sines with one value for each pair of channels, so that they load side by side.

    Of each pair the first sine of the model's tables has its sign turned round.

    Shapes: each [L, K] -> [L, K / 2].
    """
    return pe[0][:, ::2].contiguous(), pe[1][:, 1::2].contiguous()


def multiply(
    rows: Tensor,
    weight: Tensor,
    heads: Heads | None = None,
    gated: Tensor | None = None,
    first: int | None = None,
) -> None:
    """One product: columns of q, k and v to ``heads``, those behind them to ``gated``.

    Gates and values lie in turns in the weight, ``COLUMNS // 2`` rows of each.

    Shapes: rows [B, L, D], weight [N, D]; gated [B, L, kept + M], whose first columns are left.

    Args:
        first: rows of each picture up to here are multiplied with the first half of the weight,
            all others with the second; a multiple of ``ROWS``. None: the weight is of all rows.
    """
    batch, tokens, width = rows.shape
    is_joint = first is not None
    assert (first or 0) % ROWS == 0, f"{first} rows of the first stream"
    columns = len(weight) // (2 if is_joint else 1)
    of_heads = 0 if heads is None else heads.out.shape[-1]
    kept = 0 if gated is None else gated.shape[-1] - (columns - of_heads) // 2
    # Without streams, all pictures' rows are as those of one.
    items, lines = (batch, tokens) if is_joint else (1, batch * tokens)
    tiles = items * triton.cdiv(lines, ROWS) * (columns // COLUMNS)
    programs = min(tiles, processors(rows.device))
    spare = rows if gated is None else gated
    turning = heads or Heads(spare, spare, 0.0, (spare, spare))
    described = TensorDescriptor.from_tensor
    with torch.cuda.device_of(rows):
        _project[(programs,)](
            described(rows.view(items * lines, width), [ROWS, DEPTH]),
            described(weight, [COLUMNS, DEPTH]),
            described(turning.out.view(items, lines, -1), [1, ROWS, HEAD_WIDTH]),
            described(spare.view(items, lines, -1), [1, ROWS, COLUMNS // 2]),
            turning.weight,
            *turning.turns,
            items,
            lines,
            tokens,
            columns,
            width,
            turning.eps,
            of_heads,
            kept,
            first or 0,
            programs,
            HEADS=heads is not None,
            GATES=gated is not None,
            JOINT=is_joint,
            BM=ROWS,
            BN=COLUMNS,
            BK=DEPTH,
            GROUP=16 if gated is None else 8,
            # Loads that run on from tile to tile: not where a tile ends in one of two ways.
            FLATTEN=heads is None,
            **OPTIONS,
        )


def processors(device: torch.device) -> int:
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
def _turned(head, weight, cos, sin, line, lines, tokens, eps, BM: tl.constexpr):
    """RMS norm and rotation of one head of some rows. Neighbouring channels turn together."""
    scale = 1 / tl.sqrt(tl.sum(head * head, 1) / 128 + eps)[:, None]
    even, odd = tl.split(tl.reshape(head, (BM, 64, 2)))
    pair = tl.arange(0, 64)
    even = even * scale * tl.load(weight + 2 * pair).to(tl.float32)[None, :]
    odd = odd * scale * tl.load(weight + 2 * pair + 1).to(tl.float32)[None, :]
    rows = line + tl.arange(0, BM)
    place = (rows % tokens)[:, None] * 64 + pair[None, :]
    inside = rows[:, None] < lines
    c = tl.load(cos + place, mask=inside, other=0.0)
    s = tl.load(sin + place, mask=inside, other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BM, 128))


@triton.jit
def _store(tile, out, item, line, column, BM: tl.constexpr, BN: tl.constexpr):
    """Half a tile; what lies behind the picture's last row is left out."""
    out.store([item, line, column], tl.reshape(tile.to(tl.bfloat16), (1, BM, BN // 2)))


@triton.jit
def _store_heads(
    tile,
    column,
    heads,
    weight,
    cos,
    sin,
    item,
    line,
    lines,
    tokens,
    eps,
    TURN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    left, right = _halves(tile, BM, BN)
    if TURN:
        left = _turned(left, weight, cos, sin, line, lines, tokens, eps, BM)
    _store(left, heads, item, line, column, BM, BN)
    if TURN:
        right = _turned(right, weight, cos, sin, line, lines, tokens, eps, BM)
    _store(right, heads, item, line, column + BN // 2, BM, BN)


@triton.jit
def _store_gated(tile, gated, item, line, column, BM: tl.constexpr, BN: tl.constexpr):
    gate, value = _halves(tile, BM, BN)
    _store(gate / (1 + tl.exp(-gate)) * value, gated, item, line, column, BM, BN)


@triton.jit(do_not_specialize=["items", "lines", "tokens", "first", "programs"])
def _project(
    x,
    w,
    heads,
    gated,
    weight,
    cos,
    sin,
    items,
    lines,
    tokens,
    columns,
    width,
    eps,
    of_heads,
    kept,
    first,
    programs,
    HEADS: tl.constexpr,
    GATES: tl.constexpr,
    JOINT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Rows [items * lines, width] times w [columns, width] transposed, or that of their stream.

    Programs take tiles in turns.
    """
    per_item = tl.cdiv(lines, BM)
    tiles_m, tiles_n = items * per_item, columns // BN
    steps = width // BK
    done = tl.program_id(0) - programs  # counted apart, so that loads may run ahead of stores
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=FLATTEN):
        at_m, at_n = _place(tile, tiles_m, tiles_n, GROUP)
        row, of_weight = at_m * BM, at_n * BN
        if JOINT:
            line = at_m % per_item * BM
            row = at_m // per_item * lines + line
            of_weight += tl.where(line < first, 0, columns)
        product = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            these = x.load([row, step * BK])
            product = tl.dot(these, w.load([of_weight, step * BK]).T, product)
        done += programs
        at_m, at_n = _place(done, tiles_m, tiles_n, GROUP)
        item, line, column, norms = 0, at_m * BM, at_n * BN, weight
        if JOINT:
            item, line = at_m // per_item, at_m % per_item * BM
            norms = weight + tl.where(line < first, 0, 256)
        if not HEADS:
            _store_gated(product, gated, item, line, kept + column // 2, BM, BN)
        elif column < of_heads // 3 * 2:
            own = norms + 128 * (column >= of_heads // 3).to(tl.int32)
            _store_heads(
                product, column, heads, own, cos, sin, item, line, lines, tokens, eps, True, BM, BN
            )
        elif not GATES or column < of_heads:
            _store_heads(
                product,
                column,
                heads,
                norms,
                cos,
                sin,
                item,
                line,
                lines,
                tokens,
                eps,
                False,
                BM,
                BN,
            )
        else:
            _store_gated(product, gated, item, line, kept + (column - of_heads) // 2, BM, BN)
