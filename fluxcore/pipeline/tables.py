"""What all pictures of one size, or of one schedule, have in common: made once, kept on the device.

Owns how many of each are kept. Each picture would otherwise read the modulation weights, 4 % of the
transformer's, and launch 45 small kernels before its first step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fluxcore.config import TransformerConfig
from fluxcore.models import Modulation
from fluxcore.models.rope import Rope, axial_rope
from fluxcore.pipeline.latents import Grid, position_ids

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")

KEPT_STEPS = 64
"""Of all schedules: a 4B's take 0.1 MB each."""


class Tables(Generic[Key, Made]):
    """Bounded: the least recently used goes first.

    Args:
        limit: what all that are kept may come to, by ``size``.
    """

    def __init__(
        self, make: Callable[[Key], Made], limit: int, size: Callable[[Made], int] = lambda _: 1
    ) -> None:
        self._make = make
        self._limit = limit
        self._size = size
        self._kept: OrderedDict[Key, Made] = OrderedDict()

    def of(self, key: Key) -> Made:
        """The same object for as long as it is kept."""
        found = self._kept.pop(key, None)
        made = self._kept[key] = self._make(key) if found is None else found
        while sum(map(self._size, self._kept.values())) > self._limit:
            self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget all tables; they are made again when needed."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


class RopeTables(Tables[tuple[Grid, ...], Rope]):
    """Position tables per size and references."""

    def __init__(
        self, config: TransformerConfig, device: torch.device, angles: torch.dtype, limit: int = 16
    ) -> None:
        def make(grids: tuple[Grid, ...]) -> Rope:
            ids = position_ids(grids[0], grids[1:])
            cos, sin = axial_rope(ids, config.rope_axes, config.rope_theta, angles)
            return cos.to(device), sin.to(device)

        super().__init__(make, limit)

    def get(self, grid: Grid, references: Sequence[Grid]) -> Rope:
        """Shapes: cos, sin [512 + all tokens, K] float32."""
        return self.of((grid, *references))


class Modulations(Tables[tuple[float, ...], list[Modulation]]):
    """AdaLN vectors per schedule.

    Args:
        modulation: of the transformer.
        placed: float32 numbers of the host on the device.
        limit: steps, of all schedules that are kept.
    """

    def __init__(
        self,
        modulation: Callable[[Tensor], list[Modulation]],
        placed: Callable[[Tensor], Tensor],
        limit: int = KEPT_STEPS,
    ) -> None:
        def make(levels: tuple[float, ...]) -> list[Modulation]:
            return modulation(placed(torch.tensor(levels, dtype=torch.float32)))

        super().__init__(make, limit, size=len)

    def get(self, sigmas: Sequence[float], start_step: int) -> list[Modulation]:
        """One of each step from ``start_step`` on; the last noise level is no step's."""
        return self.of(tuple(sigmas[start_step:-1]))
