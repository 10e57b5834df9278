"""The transformer's blocks with their large matrices in fp8.

Owns the loop over double and single blocks: products are the library's, and between two of them
goes one pass over the rows of both streams, which adds what a block gave, norms the sum for what
comes next and rounds that. The plain form is ``Flux2Transformer.run_blocks``. The last block gives
only the rows that are asked for.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_blocks import Update, next_rows
from fluxcore.runtime.triton_kernels import FormedRows, Rope, add_gated

ALL = slice(None)


def fits(transformer: Any) -> bool:
    """Whether all that reads normed rows in the blocks is in eight bits."""
    streams = chain.from_iterable((b.txt, b.img) for b in transformer.double_blocks)
    linears = [linear for stream in streams for linear in (stream.qkv, stream.mlp_in)]
    linears += [block.qkv_mlp for block in transformer.single_blocks]
    return all(isinstance(linear, EightBitLinear) for linear in linears)


class NarrowBlocks:
    """The blocks of a transformer; their weights stay as they are."""

    def __init__(self, transformer: Any) -> None:
        self._eps: float = transformer.config.norm_eps
        self._double = list(transformer.double_blocks)
        self._single = list(transformer.single_blocks)

    def __call__(self, img: Tensor, txt: Tensor, mod: Any, pe: Rope, out_tokens: int) -> Tensor:
        """As ``Flux2Transformer.run_blocks``, for rows that share one noise level."""
        assert mod.single[0].numel() == img.shape[-1], "all rows share one noise level"
        split = txt.shape[1]
        # Of both streams, the text's first: [6, 2, D].
        shift, factor, gate, *of_mlp = torch.stack((mod.txt, mod.img), dim=1).squeeze(2)
        mlp_shift, mlp_factor, mlp_gate = of_mlp
        then_shift, then_factor, then_gate = mod.single
        x = torch.cat((txt, img), dim=1)  # joint order: [txt, img]
        x, rows = self._next(x, None, shift, factor, split)
        for number, block in enumerate(self._double, start=1):
            update = Update(_attended(block, rows, x.dtype, pe, split), gate)
            x, rows = self._next(x, update, mlp_shift, mlp_factor, split)
            update = Update(_gated(block, rows, x.dtype, split), mlp_gate)
            if number == len(self._double):
                shift, factor = then_shift, then_factor
            x, rows = self._next(x, update, shift, factor, split)
        for block in self._single[:-1]:
            update = Update((_updates(block, rows, x.dtype, pe),), then_gate)
            x, rows = self._next(x, update, then_shift, then_factor, split)
        kept = slice(split, split + out_tokens)
        y = _updates(self._single[-1], rows, x.dtype, pe, kept)
        return add_gated(x[:, kept].contiguous(), then_gate, y)

    def _next(
        self, x: Tensor, update: Update | None, shift: Tensor, factor: Tensor, split: int
    ) -> tuple[Tensor, FormedRows]:
        linear = self._single[0].qkv_mlp
        return next_rows(linear, x, update, shift, factor, split, self._eps)


def _attended(
    block: Any, rows: FormedRows, dtype: torch.dtype, pe: Rope, split: int
) -> tuple[Tensor, Tensor]:
    """What attention adds to each stream. Shapes: rows [B, L, D] -> [B, L_i, D]."""
    streams = [
        (_product(stream.qkv, rows, dtype, part), stream.qk_norm)
        for stream, part in _parts(block, split)
    ]
    attended = block.attention(*block.joint_heads(streams, pe), None)  # [B, H, L, K]
    attended = attended.transpose(1, 2).flatten(2)  # [B, L, D]
    txt, img = (stream.out(attended[:, part]) for stream, part in _parts(block, split))
    return txt, img


def _gated(block: Any, rows: FormedRows, dtype: torch.dtype, split: int) -> tuple[Tensor, Tensor]:
    """What the MLPs add. Shapes: rows [B, L, D] -> [B, L_i, D] of each stream."""
    txt, img = (
        stream.gated(stream.mlp_out, _product(stream.mlp_in, rows, dtype, part))
        for stream, part in _parts(block, split)
    )
    return txt, img


def _updates(
    block: Any, rows: FormedRows, dtype: torch.dtype, pe: Rope, kept: slice = ALL
) -> Tensor:
    """What a block adds, before its gate. Shapes: rows [B, L, D] -> [B, L_kept, D]."""
    qkv, mlp = _product(block.qkv_mlp, rows, dtype, ALL).split(block.sizes, dim=-1)
    q, k, v = block.joint_heads(((qkv, block.qk_norm),), pe)
    attended = block.attention(q[:, :, kept], k, v, None)  # [B, H, L_kept, K]
    attended = attended.transpose(1, 2).flatten(2)  # [B, L_kept, D]
    return block.gated(block.out, mlp[:, kept], attended)  # type: ignore[no-any-return]


def _parts(block: Any, split: int) -> tuple[tuple[Any, slice], tuple[Any, slice]]:
    """Each stream with its tokens."""
    return (block.txt, slice(0, split)), (block.img, slice(split, None))


def _product(linear: EightBitLinear, rows: FormedRows, dtype: torch.dtype, part: slice) -> Tensor:
    """Of some tokens' rows. Shapes: rows [B, L, D] -> [B, L_part, N]."""
    values = rows.values[:, part]
    scales = rows.scales.view(*rows.values.shape[:2], 1)[:, part]
    product = linear.multiply(values.flatten(0, 1), scales.flatten(0, 1), dtype)
    return product.view(*values.shape[:2], -1)
