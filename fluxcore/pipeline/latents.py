"""Latents as tokens: noise, packing, position ids and their tables."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxcore.config import TEXT_TOKENS, TransformerConfig
from fluxcore.models.rope import Rope, axial_rope

Grid = tuple[int, int]
"""(rows, columns) of latent tokens."""

REFERENCE_SPACING = 10
"""Reference i stands at T = 10 + 10 i; the picture itself at T = 0."""


def draw_noise(seed: int, channels: int, grid: Grid) -> Tensor:
    """Seeded noise on the host, the same for every device and dtype.

    diffusers draws in the model's dtype from a CPU generator, which gives these
    very values, rounded; with PyTorch 2.11, in bfloat16, it gives others.

    Shapes: [1, h w, C] float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return pack(torch.randn((1, channels, *grid), generator=generator))


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


class RopeTables:
    """Position tables per size and references, kept on the device.

    Bounded: the least recently used of ``limit`` tables goes first.
    """

    def __init__(
        self, config: TransformerConfig, device: torch.device, angles: torch.dtype, limit: int = 16
    ) -> None:
        self._config = config
        self._device = device
        self._angles = angles
        self._limit = limit
        self._tables: OrderedDict[tuple[Grid, ...], Rope] = OrderedDict()

    def get(self, grid: Grid, references: Sequence[Grid]) -> Rope:
        """Shapes: cos, sin [512 + all tokens, K] float32."""
        key = (grid, *references)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        ids = position_ids(grid, references)
        cos, sin = axial_rope(ids, self._config.rope_axes, self._config.rope_theta, self._angles)
        self._tables[key] = (cos.to(self._device), sin.to(self._device))
        if len(self._tables) > self._limit:
            self._tables.popitem(last=False)
        return self._tables[key]

    def clear(self) -> None:
        """Forget all tables; they are made again when needed."""
        self._tables.clear()

    def __len__(self) -> int:
        return len(self._tables)
