"""Latents as tokens: noise, packing and position ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxcore.config import TEXT_TOKENS

Grid = tuple[int, int]
"""(rows, columns) of latent tokens."""

REFERENCE_SPACING = 10
"""Reference i stands at T = 10 + 10 i; the picture itself at T = 0."""


def draw_noise(seed: int, channels: int, grid: Grid, *, pinned: bool = False) -> Tensor:
    """Seeded noise on the host, the same for every device and dtype.

    diffusers draws in the model's dtype from a CPU generator, which gives these
    very values, rounded; with PyTorch 2.11, in bfloat16, it gives others.

    Args:
        pinned: into memory from which CUDA copies without a copy in between.

    Shapes: [1, h w, C] float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return pack(torch.randn((1, channels, *grid), generator=generator, pin_memory=pinned))


def pack(latents: Tensor) -> Tensor:
    """Shapes: [B, C, h, w] -> [B, h w, C], row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: Grid) -> Tensor:
    """Undo ``pack``. Shapes: [B, h w, C] -> [B, C, h, w]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)


def position_ids(grid: Grid, references: Sequence[Grid]) -> Tensor:
    """Coordinates (T, H, W, L) of [txt, img, references].

    Shapes: [512 + all tokens, 4] int64.
    Source: diffusers Flux2KleinPipeline._prepare_text_ids, _prepare_latent_ids and
    _prepare_image_ids.
    """
    text = torch.zeros(TEXT_TOKENS, 4, dtype=torch.int64)
    text[:, 3] = torch.arange(TEXT_TOKENS)
    parts = [text, _grid_ids(0, grid)]
    for i, reference in enumerate(references):
        parts.append(_grid_ids(REFERENCE_SPACING * (i + 1), reference))
    return torch.cat(parts)


def _grid_ids(time: int, grid: Grid) -> Tensor:
    rows, columns = grid
    return torch.cartesian_prod(
        torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.tensor([0])
    )
