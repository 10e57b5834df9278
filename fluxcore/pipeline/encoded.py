"""What the text encoder and the VAE made of a request: all that the pictures of one job share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxcore.pipeline.conditioning import Conditioning
from fluxcore.pipeline.latents import Grid


@dataclass(frozen=True, slots=True)
class EncodedReferences:
    """References as the transformer takes them.

    Shapes: tokens [1, L_ref, C], all references one after the other.
    """

    tokens: Tensor | None
    grids: tuple[Grid, ...]
    first: Tensor | None

    @classmethod
    def joined(cls, pieces: Sequence[tuple[Tensor, Grid]]) -> EncodedReferences:
        """References, each encoded apart, as one sequence in their order."""
        if not pieces:
            return NO_REFERENCES
        tokens = [packed for packed, _ in pieces]
        return cls(torch.cat(tokens, dim=1), tuple(grid for _, grid in pieces), tokens[0])


NO_REFERENCES = EncodedReferences(None, (), None)


@dataclass(frozen=True, slots=True)
class EncodedJob:
    """Prompts and references.

    Attributes:
        negative: None where guidance is off.
    """

    positive: Conditioning
    negative: Conditioning | None
    references: EncodedReferences
