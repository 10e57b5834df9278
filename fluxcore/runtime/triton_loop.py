"""The order in which the transformer's blocks run, with one pass between two products.

Owns the loop over double and single blocks and that pass: text and image rows lie on end from the
first block on, and each residual sum is written together with its norm for what comes next,
rounded where that is multiplied in fp8. What a block adds is found by those who derive from the
loop. The last block gives only the rows that are asked for. The plain form is
``Flux2Transformer.run_blocks``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcore.runtime.triton_addends import Addend
from fluxcore.runtime.triton_kernels import FormedRows, Rope, add_gated, launch, store_row


class Update(NamedTuple):
    """What is to be added to the rows of each stream, or of all."""

    parts: tuple[Addend, ...]
    gate: Tensor


class BlockLoop(ABC):
    """The blocks of a transformer.

    Shapes: rows [B, L, D], modulated.
    """

    def __init__(self, transformer: Any) -> None:
        self.eps: float = transformer.config.norm_eps
        self.double = list(transformer.double_blocks)
        self.single = list(transformer.single_blocks)

    @abstractmethod
    def attended(self, number: int, rows: FormedRows, pe: Rope, split: int) -> tuple[Addend, ...]:
        """What attention of a double block adds to each stream. Shapes: -> [B, L_i, D]."""

    @abstractmethod
    def gated(self, number: int, rows: FormedRows, split: int) -> tuple[Addend, ...]:
        """What the MLPs of a double block add. Shapes: -> [B, L_i, D] of each stream."""

    @abstractmethod
    def updates(self, block: Any, rows: FormedRows, pe: Rope, kept: slice | None) -> Addend:
        """What a single block adds. Shapes: -> [B, L_kept, D].

        Args:
            kept: the rows that are asked for; None: all.
        """

    def tables(self, pe: Rope) -> Rope:
        """Positions as the blocks take them."""
        return pe

    def __call__(self, img: Tensor, txt: Tensor, mod: Any, pe: Rope, out_tokens: int) -> Tensor:
        """As ``Flux2Transformer.run_blocks``, for rows that share one noise level."""
        assert mod.single[0].numel() == img.shape[-1], "all rows share one noise level"
        pe, split = self.tables(pe), txt.shape[1]
        # Of both streams, the text's first: [6, 2, D].
        shift, factor, gate, *of_mlp = torch.stack((mod.txt, mod.img), dim=1).squeeze(2)
        mlp_shift, mlp_factor, mlp_gate = of_mlp
        then_shift, then_factor, then_gate = mod.single
        x = torch.cat((txt, img), dim=1)  # joint order: [txt, img]
        x, rows = self._next(x, None, shift, factor, split)
        for number in range(len(self.double)):
            update = Update(self.attended(number, rows, pe, split), gate)
            x, rows = self._next(x, update, mlp_shift, mlp_factor, split)
            update = Update(self.gated(number, rows, split), mlp_gate)
            if number + 1 == len(self.double):
                shift, factor = then_shift, then_factor
            x, rows = self._next(x, update, shift, factor, split)
        for block in self.single[:-1]:
            update = Update((self.updates(block, rows, pe, None),), then_gate)
            x, rows = self._next(x, update, then_shift, then_factor, split)
        kept = slice(split, split + out_tokens)
        y = self.updates(self.single[-1], rows, pe, kept)
        return add_gated(x[:, kept].contiguous(), then_gate, y.whole())

    def _next(
        self, x: Tensor, update: Update | None, shift: Tensor, factor: Tensor, split: int
    ) -> tuple[Tensor, FormedRows]:
        """x with an update, and that modulated for the layer that comes next.

        Shapes: x [B, L, D], contiguous; shift and factor [1, D], or [2, D] for both streams, of
        which the first has ``split`` tokens.
        """
        _, tokens, width = x.shape
        # All layers that read such rows are in eight bits, or none is.
        rows = FormedRows.made(self.single[0].qkv_mlp, x, width)
        total = x if update is None else torch.empty_like(x)
        parts, gate = update or Update((Addend(x),), shift)
        first, second = parts[0], parts[-1]
        is_scaled = first.scales is not None
        assert is_scaled == (second.scales is not None), "both parts are of one kind"
        launch(
            _add_and_modulate,
            (x.numel() // width,),
            x,
            first.values,
            second.values,
            *(first.scales or (gate, gate)),
            *(second.scales or (gate, gate)),
            gate,
            shift,
            factor,
            total,
            rows.values,
            rows.scales,
            split,
            tokens,
            width,
            # Where the vectors of the second stream begin.
            gate.numel() - width,
            shift.numel() - width,
            self.eps,
            *rows.rounding,
            update is not None,
            len(parts) == 2,
            is_scaled,
            triton.next_power_of_2(width),
            num_warps=4,
        )
        return total, rows


@triton.jit
def _part_of(values, rows, columns, row, width, at, inside, is_there, SCALED: tl.constexpr):
    """A row of one stream's part, if it is one of that stream's; else zeros."""
    mask = inside & is_there
    found = tl.load(values + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        found *= tl.load(columns + at, mask=mask, other=0.0)
        found *= tl.load(rows + row, mask=is_there, other=0.0)
    return found


@triton.jit
def _add_and_modulate(
    x,
    first,
    second,
    rows_of_first,
    columns_of_first,
    rows_of_second,
    columns_of_second,
    gate,
    shift,
    factor,
    total,
    rows,
    scales,
    split,
    tokens,
    width,
    gate_step,
    norm_step,
    eps,
    largest,
    smallest,
    ROUND: tl.constexpr,
    ADD: tl.constexpr,
    TWO: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row with what is added to it, from that of its stream, and its norm."""
    row = tl.program_id(0).to(tl.int64)
    item, line = row // tokens, row % tokens
    stream = (line >= split).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        own = row
        if TWO:
            own = tl.where(stream == 0, item * split + line, item * (tokens - split) + line - split)
        is_first = (stream == 0) if TWO else row >= 0
        added = _part_of(
            first, rows_of_first, columns_of_first, own, width, at, inside, is_first, SCALED
        )
        if TWO:
            added += _part_of(
                second,
                rows_of_second,
                columns_of_second,
                own,
                width,
                at,
                inside,
                stream == 1,
                SCALED,
            )
        weight = tl.load(gate + stream * gate_step + at, mask=inside, other=0.0)
        added = added * weight.to(tl.float32) + values
        # Normed as it is written, so that it is the same as in two kernels.
        narrow = added.to(total.dtype.element_ty)
        tl.store(total + row * width + at, narrow, mask=inside)
        values = narrow.to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    step = stream * norm_step
    scaled = normed * tl.load(factor + step + at, mask=inside, other=0.0).to(tl.float32)
    moved = scaled + tl.load(shift + step + at, mask=inside, other=0.0).to(tl.float32)
    store_row(moved, rows, scales, width, largest, smallest, ROUND, BLOCK)
