"""The transformer's blocks with their large matrices in fp8.

Owns what a block adds: its products are the library's, on rows that were rounded as they were
normed. Those onto the residual stream leave their scales to the pass that adds them up: without,
the library has faster kernels.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_kernels import FormedRows, Rope, gated_rows
from fluxcore.runtime.triton_loop import Addend, BlockLoop

ALL = slice(None)


def fits(transformer: Any) -> bool:
    """Whether all matrices of the blocks are in eight bits."""
    streams = list(chain.from_iterable((b.txt, b.img) for b in transformer.double_blocks))
    linears = [linear for stream in streams for linear in (stream.qkv, stream.mlp_in)]
    linears += [linear for stream in streams for linear in (stream.out, stream.mlp_out)]
    linears += [linear for b in transformer.single_blocks for linear in (b.qkv_mlp, b.out)]
    return all(isinstance(linear, EightBitLinear) for linear in linears)


class NarrowBlocks(BlockLoop):
    """The blocks of a transformer; their weights stay as they are."""

    def attended(self, number: int, rows: FormedRows, pe: Rope, split: int) -> tuple[Addend, ...]:
        block = self.double[number]
        parts = _parts(block, split)
        streams = [(_product(stream.qkv, rows, part), stream.qk_norm) for stream, part in parts]
        attended = block.attention(*block.joint_heads(streams, pe), None)  # [B, H, L, K]
        attended = attended.transpose(1, 2).flatten(2)  # [B, L, D]
        return tuple(_rounded_product(stream.out, attended[:, part]) for stream, part in parts)

    def gated(self, number: int, rows: FormedRows, split: int) -> tuple[Addend, ...]:
        return tuple(
            _gated_product(stream.mlp_out, _product(stream.mlp_in, rows, part))
            for stream, part in _parts(self.double[number], split)
        )

    def updates(self, block: Any, rows: FormedRows, pe: Rope, kept: slice | None) -> Addend:
        kept = kept or ALL
        qkv, mlp = _product(block.qkv_mlp, rows, ALL).split(block.sizes, dim=-1)
        q, k, v = block.joint_heads(((qkv, block.qk_norm),), pe)
        attended = block.attention(q[:, :, kept], k, v, None)  # [B, H, L_kept, K]
        attended = attended.transpose(1, 2).flatten(2)  # [B, L_kept, D]
        return _gated_product(block.out, mlp[:, kept], attended)


def _parts(block: Any, split: int) -> tuple[tuple[Any, slice], tuple[Any, slice]]:
    """Each stream with its tokens."""
    return (block.txt, slice(0, split)), (block.img, slice(split, None))


def _product(linear: EightBitLinear, rows: FormedRows, part: slice) -> Tensor:
    """Of some tokens' rows. Shapes: rows [B, L, D] -> [B, L_part, N]."""
    values = rows.values[:, part]
    scales = rows.scales.view(*rows.values.shape[:2], 1)[:, part]
    product = linear.multiply(values.flatten(0, 1), scales.flatten(0, 1), torch.bfloat16)
    return product.view(*values.shape[:2], -1)


def _rounded_product(linear: EightBitLinear, x: Tensor) -> Addend:
    """Of rows that are rounded here. Shapes: x [B, L, K] -> [B, L, N]."""
    values, scales = linear.format.round_rows(x.flatten(0, 1))
    return _unscaled(linear, values, scales, x.shape[0])


def _gated_product(linear: EightBitLinear, hidden: Tensor, before: Tensor | None = None) -> Addend:
    """As ``fluxcore.kernels.gated_linear``. Shapes: -> [B, L, N]."""
    rows = gated_rows(linear, hidden, before)
    return _unscaled(linear, rows.values.flatten(0, -2), rows.scales, hidden.shape[0])


def _unscaled(linear: EightBitLinear, values: Tensor, scales: Tensor, batch: int) -> Addend:
    """Shapes: values [B L, K] in eight bits, scales [B L, 1] -> [B, L, N]."""
    assert linear.format.unscaled is not None, "a format for GPUs"
    product = linear.format.unscaled(values, linear.weight)
    return Addend(product.unflatten(0, (batch, -1)), (scales, linear.weight_scale))
