"""The transformer's blocks with their large matrices in fp8.

Owns what a block adds: its products are the library's, on rows that were rounded as they were
normed. Those onto the residual stream leave their scales to the pass that adds them up.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_addends import Addend, gated_product, rounded_product
from fluxcore.runtime.triton_kernels import FormedRows, Rope
from fluxcore.runtime.triton_loop import BlockLoop

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
        return tuple(rounded_product(stream.out, attended[:, part]) for stream, part in parts)

    def gated(self, number: int, rows: FormedRows, split: int) -> tuple[Addend, ...]:
        return tuple(
            gated_product(stream.mlp_out, _product(stream.mlp_in, rows, part))
            for stream, part in _parts(self.double[number], split)
        )

    def updates(self, block: Any, rows: FormedRows, pe: Rope, kept: slice | None) -> Addend:
        kept = kept or ALL
        qkv, mlp = _product(block.qkv_mlp, rows, ALL).split(block.sizes, dim=-1)
        q, k, v = block.joint_heads(((qkv, block.qk_norm),), pe)
        attended = block.attention(q[:, :, kept], k, v, None)  # [B, H, L_kept, K]
        attended = attended.transpose(1, 2).flatten(2)  # [B, L_kept, D]
        return gated_product(block.out, mlp[:, kept], attended)


def _parts(block: Any, split: int) -> tuple[tuple[Any, slice], tuple[Any, slice]]:
    """Each stream with its tokens."""
    return (block.txt, slice(0, split)), (block.img, slice(split, None))


def _product(linear: EightBitLinear, rows: FormedRows, part: slice) -> Tensor:
    """Of some tokens' rows. Shapes: rows [B, L, D] -> [B, L_part, N]."""
    values = rows.values[:, part]
    scales = rows.scales.view(*rows.values.shape[:2], 1)[:, part]
    product = linear.multiply(values.flatten(0, 1), scales.flatten(0, 1), torch.bfloat16)
    return product.view(*values.shape[:2], -1)
