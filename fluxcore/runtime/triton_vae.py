"""Element-wise work of the VAE as Triton kernels: norms, residual sums, doubled pixels.

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

from fluxcore.runtime.triton_kernels import launch

COLUMNS = 1024
"""Values that one program adds or doubles."""
ELEMENTS = 8192
"""Values of a picture that one program norms at once."""
NORM_TILES = 8
"""Tiles that one program sums."""


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
def _double(x, out, size, width, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(x + at, mask=inside)
    pixel = at // channels
    row, column = pixel // width, pixel % width
    corner = (row * 4 * width + column * 2) * channels + at % channels
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(out + corner + (down * 2 * width + right) * channels, values, mask=inside)


def doubled(x: Tensor) -> Tensor:
    """As ``fluxcore.models.vae.doubled``, for pictures whose channels lie side by side."""
    last = torch.channels_last
    if not x.is_contiguous(memory_format=last):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    batch, channels, height, width = x.shape
    shape = (batch, channels, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
    grid = (triton.cdiv(x.numel(), COLUMNS),)
    launch(_double, grid, x, out, x.numel(), width, channels, COLUMNS, num_warps=4)
    return out
