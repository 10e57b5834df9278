"""Work of the VAE as Triton kernels: norms, residual sums, doubled pictures, weights of scores.

As ``fluxcore.runtime.triton_kernels``: each stands for a plain form, of ``fluxcore.models.vae``,
computes in float32 and rounds once, and hands what it does not take to the plain form.

Source of the algorithms: the plain forms; Triton's tutorials for rows and reductions.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from fluxcore.runtime.attention import SCORED_ROWS, scored
from fluxcore.runtime.attention import wide_attention as plain_wide_attention
from fluxcore.runtime.triton_kernels import launch

COLUMNS = 1024
"""Values that one program adds or puts side by side."""
ELEMENTS = 8192
"""Values of a picture that one program norms at once."""
NORM_TILES = 8
"""Tiles that one program sums."""
MOST_SCORES = 2**16
"""Of one query, that one program holds."""


@triton.jit
def _sum_channels(
    x,
    sums,
    pixels,
    channels,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    part, batch = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)[None, :]
    inside = channel < channels
    source = x + batch.to(tl.int64) * pixels * channels + channel
    # Sums of differences from the first pixel, so that a large mean costs no digits.
    pivot = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    once = tl.zeros((BLOCK, WIDTH), tl.float32)
    twice = tl.zeros((BLOCK, WIDTH), tl.float32)
    for step in range(STEPS):
        pixel = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)[:, None]
        there = inside & (pixel < pixels)
        values = tl.load(source + pixel.to(tl.int64) * channels, mask=there, other=0.0)
        apart = tl.where(there, values.to(tl.float32) - pivot, 0.0)
        once += apart
        twice += apart * apart
    at = tl.arange(0, WIDTH)
    place = sums + (batch * tl.num_programs(0) + part) * 2 * channels + at
    tl.store(place, tl.sum(once, 0), mask=at < channels)
    tl.store(place + channels, tl.sum(twice, 0), mask=at < channels)


@triton.jit
def _factors(
    x,
    sums,
    weight,
    bias,
    added,
    factors,
    pixels,
    channels,
    parts,
    eps,
    ADDED: tl.constexpr,
    EACH: tl.constexpr,
    PARTS: tl.constexpr,
    STEPS: tl.constexpr,
):
    # In 32 bits, which is enough: 2048 x 2048 pixels have at most 256 channels in groups of 8, so
    # that EACH * pixels is 2**25, and the sums of a picture are 2**23. Where places in pictures
    # are counted, 2**30 of each, and in all other kernels rows times width, it is in 64.
    group, batch = tl.program_id(0), tl.program_id(1)
    channel = group * EACH + tl.arange(0, EACH)
    once = tl.zeros((EACH,), tl.float32)
    twice = tl.zeros((EACH,), tl.float32)
    for step in range(STEPS):
        part = step * PARTS + tl.arange(0, PARTS)[:, None]
        place = sums + (batch * parts + part) * 2 * channels + channel[None, :]
        once += tl.sum(tl.load(place, mask=part < parts, other=0.0), 0)
        twice += tl.sum(tl.load(place + channels, mask=part < parts, other=0.0), 0)
    pivot = tl.load(x + batch.to(tl.int64) * pixels * channels + channel).to(tl.float32)
    more = tl.load(added + channel).to(tl.float32) if ADDED else tl.zeros((EACH,), tl.float32)
    mean = pivot + more + once / pixels  # of each channel
    squares = twice - once * once / pixels
    centre = tl.sum(mean, 0) / EACH
    away = mean - centre
    variance = tl.sum(squares + away * away * pixels, 0) / (EACH * pixels)
    factor = tl.load(weight + channel).to(tl.float32) / tl.sqrt(variance + eps)
    shift = tl.load(bias + channel).to(tl.float32) + (more - centre) * factor
    tl.store(factors + batch * 2 * channels + channel, factor)
    tl.store(factors + (batch * 2 + 1) * channels + channel, shift)


@triton.jit
def _scale_channels(
    x, factors, out, pixels, channels, SILU: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    batch = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    there = (channel < channels) & (pixel < pixels)
    factor = tl.load(factors + batch * 2 * channels + channel, mask=channel < channels, other=0.0)
    shift = tl.load(
        factors + (batch * 2 + 1) * channels + channel, mask=channel < channels, other=0.0
    )
    place = (batch.to(tl.int64) * pixels + pixel) * channels + channel
    values = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * factor + shift
    if SILU:
        values = values / (1 + tl.exp(-values))
    tl.store(out + place, values.to(out.dtype.element_ty), mask=there)


def normed(
    x: Tensor, norm: nn.GroupNorm, added: Tensor | None = None, *, silu: bool = True
) -> Tensor:
    """As ``fluxcore.models.vae.normed``, for pictures whose channels lie side by side.

    Args:
        added: a bias that x is still without, [C].
    """
    batch, channels, height, width = x.shape
    each = channels // norm.num_groups
    power = each & (each - 1) == 0
    if not (power and x.is_contiguous(memory_format=torch.channels_last)):
        x = x if added is None else x + added[:, None, None]
        return F.silu(norm(x)) if silu else norm(x)
    pixels = height * width
    side = triton.next_power_of_2(channels)
    block = max(1, ELEMENTS // side)
    tiles = triton.cdiv(pixels, block)
    parts = triton.cdiv(tiles, NORM_TILES)
    at_once = max(1, 1024 // each)
    sums = x.new_empty((batch, parts, 2, channels), dtype=torch.float32)
    factors = x.new_empty((batch, 2, channels), dtype=torch.float32)
    out = torch.empty_like(x)
    launch(
        _sum_channels,
        (parts, batch),
        x,
        sums,
        pixels,
        channels,
        NORM_TILES,
        block,
        side,
        num_warps=8,
    )
    launch(
        _factors,
        (norm.num_groups, batch),
        x,
        sums,
        norm.weight,
        norm.bias,
        x if added is None else added,
        factors,
        pixels,
        channels,
        parts,
        norm.eps,
        added is not None,
        each,
        at_once,
        triton.next_power_of_2(triton.cdiv(parts, at_once)),
    )
    launch(
        _scale_channels,
        (tiles, batch),
        x,
        factors,
        out,
        pixels,
        channels,
        silu,
        block,
        side,
        num_warps=8,
    )
    return out


@triton.jit
def _add_pictures(x, y, bias, out, size, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(bias + at % channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, added.to(out.dtype.element_ty), mask=inside)


class Residual(Protocol):
    """A residual block of the VAE."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None


def residual_block(block: Residual, x: Tensor) -> Tensor:
    """As ``fluxcore.models.vae.residual_block``; biases are added with what comes next."""
    hidden = _unbiased(block.conv1, normed(x, block.norm1))
    hidden = _unbiased(block.conv2, normed(hidden, block.norm2, block.conv1.bias))
    bias = block.conv2.bias
    assert bias is not None
    if block.shortcut is not None:
        assert block.shortcut.bias is not None
        bias = bias + block.shortcut.bias
        x = _unbiased(block.shortcut, x)
    last = torch.channels_last
    if not (x.is_contiguous(memory_format=last) and hidden.is_contiguous(memory_format=last)):
        return x + hidden + bias[:, None, None]
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), COLUMNS),)
    launch(_add_pictures, grid, x, hidden, bias, out, x.numel(), x.shape[1], COLUMNS, num_warps=4)
    return out


def _unbiased(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


@triton.jit
def _interleave(phases, bias, out, size, width, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    channel, pixel = at % channels, at // channels
    row, column = pixel // (2 * width), pixel % (2 * width)
    # Of an odd row the window begins one row further down, and columns likewise.
    corner = ((row + 1) // 2) * (width + 1) + (column + 1) // 2
    phase = row % 2 * 2 + column % 2
    values = tl.load(phases + (corner * 4 + phase) * channels + channel, mask=inside, other=0.0)
    biased = values.to(tl.float32) + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, biased.to(out.dtype.element_ty), mask=inside)


class FusedUpsample:
    """As ``fluxcore.models.vae.Upsample``, without ever writing a pixel four times.

    Three rows of a picture whose rows are all there twice are two rows of the picture itself, one
    of which counts twice. So each of the four pixels that come of one is a convolution with 2x2
    weights, sums of the 3x3: 4/9 of the work. All four are one convolution of four times the
    channels, whose results are then put side by side.

    Source of the idea: "sub-pixel convolution", Shi et al. 2016, read backwards.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        assert conv.bias is not None
        self._conv = conv
        rows = _summed(conv.weight.float(), 2)  # two of [C, C, 2, 3]
        phases = torch.cat([part for row in rows for part in _summed(row, 3)])  # [4 C, C, 2, 2]
        self._phases = phases.to(conv.weight.dtype, memory_format=torch.channels_last)

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: [B, C, h, w] -> [B, C, 2 h, 2 w]."""
        last = torch.channels_last
        phases = F.conv2d(x, self._phases, padding=1)  # [B, 4 C, h + 1, w + 1]
        phases = phases.contiguous(memory_format=last)
        batch, channels, height, width = x.shape
        shape = (batch, channels, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
        for picture, found in zip(phases, out, strict=True):
            grid = (triton.cdiv(found.numel(), COLUMNS),)
            args = (self._conv.bias, found, found.numel(), width, channels, COLUMNS)
            launch(_interleave, grid, picture, *args, num_warps=4)
        return out


def _summed(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps to two, for the first and the second of two equal pixels."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


@triton.jit
def _weigh(scores, out, length, scale, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * length
    values = tl.load(scores + row + at, mask=at < length, other=float("-inf")) * scale
    powers = tl.exp(values - tl.max(values, 0))
    weights = powers / tl.sum(powers, 0)
    tl.store(out + row + at, weights.to(out.dtype.element_ty), mask=at < length)


def weighed(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Softmax of scaled scores. Shapes: [..., L] float32, at most ``MOST_SCORES`` -> the same."""
    length = scores.shape[-1]
    out = torch.empty_like(scores, dtype=dtype)
    block = triton.next_power_of_2(length)
    warps = min(32, max(4, block // 1024))
    grid = (scores.numel() // length,)
    launch(_weigh, grid, scores, out, length, scale, block, num_warps=warps)
    return out


def wide_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As ``fluxcore.runtime.attention.wide_attention``, with one pass over the scores.

    Shapes: q, k, v [B, H, L, K] -> [B, H, L, K]; ``mask`` must be None.
    """
    length = k.shape[2]
    if length > MOST_SCORES:
        return plain_wide_attention(q, k, v, mask)
    assert mask is None, "attention of wide heads takes no mask"
    heads, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B H, L, K]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, q.shape[1], SCORED_ROWS):
        rows = slice(first, first + SCORED_ROWS)
        out[:, rows] = torch.bmm(weighed(scored(q[:, rows], k), scale, v.dtype), v)
    return out.view(*heads, *out.shape[1:])
