"""Element-wise work of transformer and text encoder as Triton kernels: one pass over memory each.

Owns kernels and their launches. Each has the signature and the meaning of the plain form that it
stands for (``fluxcore.kernels``, ``fluxcore.models``), computes in float32 and rounds once at the
end, where the plain form rounds after each operation. What it does not take it hands to the plain
form. Only imported where Triton is; knows nothing of devices' choice.

Source of the algorithms: the plain forms; Triton's tutorials for rows and reductions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from fluxcore.runtime.quantised import SMALLEST_AMAX, EightBitLinear

COLUMNS = 1024
"""Columns of one row that one program gates."""
WIDE_ROWS = 8192
"""Values of a row from which on it is worked on by twice as many threads."""


Rope = tuple[Tensor, Tensor]


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, **options)


def evenly(x: Tensor) -> Tensor:
    """Rows at equal distances, which one stride tells; a copy where they are not."""
    dims = range(x.ndim - 2)
    even = all(x.shape[i] == 1 or x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in dims)
    return x if even and x.stride(-1) == 1 else x.contiguous()


class RowNorm(Protocol):
    """An RMS norm of rows: of one head or of all of them."""

    weight: Tensor
    eps: float


@triton.jit
def store_row(
    values, out, scales, width, largest, smallest, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    """A row as it is, or scaled to a format's range, with its scale."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if ROUND:
        # As if it had been written in between.
        values = values.to(tl.bfloat16).to(tl.float32)
        most = tl.maximum(tl.max(tl.abs(values), 0), smallest)
        tl.store(scales + row, most / largest)
        values *= largest / most
    tl.store(out + row * width + at, values.to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _modulate(
    x,
    shift,
    factor,
    out,
    scales,
    width,
    eps,
    largest,
    smallest,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scaled = normed * tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
    moved = scaled + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
    store_row(moved, out, scales, width, largest, smallest, ROUND, BLOCK)


def modulated(linear: nn.Module, x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """As ``fluxcore.models.flux2.modulated``."""
    width = x.shape[-1]
    if factor.numel() != width:
        return linear(torch.addcmul(shift, factor, F.layer_norm(x, (width,), eps=eps)))  # type: ignore[no-any-return]
    x = x.contiguous()
    rows = FormedRows.made(linear, x, width)
    block = triton.next_power_of_2(width)
    launch(
        _modulate,
        (x.numel() // width,),
        x,
        shift,
        factor,
        rows.values,
        rows.scales,
        width,
        eps,
        *rows.rounding,
        block,
        num_warps=4,
    )
    return rows.times(linear, x)


@dataclass(frozen=True, slots=True)
class FormedRows:
    """Where a kernel writes what a linear layer reads: as it is, or rounded for an fp8 layer.

    Attributes:
        scales: of the rows, where they are rounded.
        rounding: the largest value of the format, the smallest largest one of a row that
            counts, and whether there is any rounding.
    """

    values: Tensor
    scales: Tensor
    rounding: tuple[float, float, bool]

    @classmethod
    def made(cls, linear: nn.Module, x: Tensor, width: int) -> FormedRows:
        """For rows as many as those of x."""
        shape = (*x.shape[:-1], width)
        if not isinstance(linear, EightBitLinear):
            values = x.new_empty(shape)
            return cls(values, values, (1.0, 1.0, False))
        values = x.new_empty(shape, dtype=linear.format.dtype)
        scales = x.new_empty((values.numel() // width, 1), dtype=torch.float32)
        return cls(values, scales, (linear.format.largest, SMALLEST_AMAX, True))

    def times(self, linear: nn.Module, x: Tensor) -> Tensor:
        """The product. Shapes: [..., K] -> [..., N] in x's dtype."""
        if not isinstance(linear, EightBitLinear):
            return linear(self.values)  # type: ignore[no-any-return]
        product = linear.multiply(self.values.flatten(0, -2), self.scales, x.dtype)
        return product.view(*x.shape[:-1], -1)


@triton.jit
def _gate(before, hidden, out, before_stride, hidden_stride, kept, mlp, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (at >= kept) & (at < kept + mlp)
    source = hidden + row * hidden_stride + at - kept
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(source + mlp, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * value
    copied = tl.load(before + row * before_stride + at, mask=at < kept, other=0.0)
    both = tl.where(at < kept, copied.to(tl.float32), gated)
    place = row * (kept + mlp) + at
    tl.store(out + place, both.to(out.dtype.element_ty), mask=at < kept + mlp)


@triton.jit
def _gated_part(source, mlp, first, SIZE: tl.constexpr):
    """Some gated columns, as if they had been written in between, and the largest of them."""
    at = first + tl.arange(0, SIZE)
    gate = tl.load(source + at, mask=at < mlp, other=0.0).to(tl.float32)
    value = tl.load(source + mlp + at, mask=at < mlp, other=0.0).to(tl.float32)
    values = (gate / (1 + tl.exp(-gate)) * value).to(tl.bfloat16).to(tl.float32)
    return values, tl.max(tl.abs(values), 0)


@triton.jit
def _copied_part(source, kept, first, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    values = tl.load(source + at, mask=at < kept, other=0.0).to(tl.float32)
    return values, tl.max(tl.abs(values), 0)


@triton.jit
def _store_part(values, out, columns, first, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def _gate_and_round(
    before,
    hidden,
    out,
    scales,
    hidden_stride,
    kept,
    mlp,
    largest,
    smallest,
    GATED: tl.constexpr,
    MORE_GATED: tl.constexpr,
    COPIED: tl.constexpr,
    MORE_COPIED: tl.constexpr,
):
    """A row in parts whose sizes are powers of two, so that few threads have nothing to do."""
    row = tl.program_id(0).to(tl.int64)
    source, copied = hidden + row * hidden_stride, before + row * kept
    gated, most = _gated_part(source, mlp, 0, GATED)
    if MORE_GATED > 0:
        more_gated, of_part = _gated_part(source, mlp, GATED, MORE_GATED)
        most = tl.maximum(most, of_part)
    if COPIED > 0:
        copies, of_part = _copied_part(copied, kept, 0, COPIED)
        most = tl.maximum(most, of_part)
    if MORE_COPIED > 0:
        more_copies, of_part = _copied_part(copied, kept, COPIED, MORE_COPIED)
        most = tl.maximum(most, of_part)
    most = tl.maximum(most, smallest)
    tl.store(scales + row, most / largest)
    factor = largest / most
    place = out + row * (kept + mlp)
    _store_part(gated * factor, place + kept, mlp, 0, GATED)
    if MORE_GATED > 0:
        _store_part(more_gated * factor, place + kept, mlp, GATED, MORE_GATED)
    if COPIED > 0:
        _store_part(copies * factor, place, kept, 0, COPIED)
    if MORE_COPIED > 0:
        _store_part(more_copies * factor, place, kept, COPIED, MORE_COPIED)


def _parts(columns: int) -> tuple[int, int]:
    """The largest power of two in a number, and the smallest that holds the rest; or zeros."""
    whole = 1 << columns.bit_length() >> 1
    rest = columns - whole
    return whole, triton.next_power_of_2(rest) if rest else 0


def gated_linear(linear: nn.Module, hidden: Tensor, before: Tensor | None = None) -> Tensor:
    """As ``fluxcore.kernels.gated_linear``."""
    if not isinstance(linear, EightBitLinear):
        return linear(gated(hidden, before))  # type: ignore[no-any-return]
    return gated_rows(linear, hidden, before).times(linear, hidden)


def gated_rows(linear: EightBitLinear, hidden: Tensor, before: Tensor | None = None) -> FormedRows:
    """What ``gated`` gives, rounded for a layer."""
    hidden = evenly(hidden)
    before = hidden if before is None else before.contiguous()
    mlp = hidden.shape[-1] // 2
    kept = 0 if before is hidden else before.shape[-1]
    rows = FormedRows.made(linear, hidden, kept + mlp)
    largest, smallest, _ = rows.rounding
    launch(
        _gate_and_round,
        (hidden.shape[:-1].numel(),),
        before,
        hidden,
        rows.values,
        rows.scales,
        hidden.stride(-2),
        kept,
        mlp,
        largest,
        smallest,
        *_parts(mlp),
        *_parts(kept),
        num_warps=8,
    )
    return rows


def gated(hidden: Tensor, before: Tensor | None = None) -> Tensor:
    """As ``fluxcore.kernels.gated``."""
    rows = evenly(hidden)
    mlp = hidden.shape[-1] // 2
    kept = 0
    if before is not None:
        before = before.contiguous()
        kept = before.shape[-1]
    out = hidden.new_empty((*hidden.shape[:-1], kept + mlp))
    grid = (out.numel() // (kept + mlp), triton.cdiv(kept + mlp, COLUMNS))
    source = rows if before is None else before
    launch(_gate, grid, source, rows, out, kept, rows.stride(-2), kept, mlp, COLUMNS, num_warps=4)
    return out


@triton.jit
def _add_gated(x, gate, y, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    added = tl.load(y + row + at, mask=inside, other=0.0).to(tl.float32)
    added *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, added.to(out.dtype.element_ty), mask=inside)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """As ``torch.addcmul``, for a gate that all rows share."""
    width = x.shape[-1]
    if gate.numel() != width or not (x.is_contiguous() and y.is_contiguous()):
        return torch.addcmul(x, gate, y)
    out = torch.empty_like(x)
    grid = (x.numel() // width, triton.cdiv(width, COLUMNS))
    launch(_add_gated, grid, x, gate, y, out, width, COLUMNS, num_warps=4)
    return out


@triton.jit
def _round_rows(x, out, scales, width, largest, smallest, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * width
    values = tl.load(x + row + at, mask=at < width, other=0.0).to(tl.float32)
    store_row(values, out, scales, width, largest, smallest, ROUND, BLOCK)


def round_rows(
    x: Tensor, dtype: torch.dtype, largest: float, smallest: float
) -> tuple[Tensor, Tensor]:
    """As ``fluxcore.runtime.quantised.EightBits.round_rows``, for formats with a fraction."""
    rows, width = x.shape
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    block = triton.next_power_of_2(width)
    warps = 16 if block > WIDE_ROWS else 8
    launch(
        _round_rows, (rows,), x, out, scales, width, largest, smallest, True, block, num_warps=warps
    )
    return out, scales
