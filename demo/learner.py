"""The networks as training uses them: batches of noise levels, short texts, compiled blocks.

Owns what differs from drawing one picture: every example of a batch has a noise level
of its own, attention runs in bfloat16, and pictures are drawn many at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.architecture import DEMO, build_modules
from demo.batches import COMPILED, LONGEST_PROMPT, Batch, Kind
from demo.render import render
from demo.run import load
from fluxcore.kernels import plain_attention
from fluxcore.models import Flux2Transformer, Modulation, Qwen3Encoder
from fluxcore.models.flux2 import timestep_embedding
from fluxcore.models.rope import Rope, axial_rope
from fluxcore.pipeline.latents import REFERENCE_SPACING, pack, unpack
from fluxcore.pipeline.schedule import sigmas

ENCODED_PIXELS = 64 * 256 * 256
"""Rendered and encoded at a time."""


class Learner(nn.Module):
    """Transformer and text encoder, trained together in one latent space.

    Args:
        vae: a file with the trained autoencoder, which is never changed here.
    """

    def __init__(self, vae: Path, device: torch.device) -> None:
        super().__init__()
        self.channels = DEMO.in_channels
        self.transformer, self.text_encoder, self.vae = build_modules(DEMO)
        load(vae, vae=self.vae)
        self.vae.requires_grad_(False).eval()
        start_like_a_diffusion_transformer(self.transformer)
        start_like_a_deep_encoder(self.text_encoder)
        use_kernels(self.transformer, self.text_encoder)
        self.to(device)
        self.encoder = deepcopy(self.vae).to(encoding_dtype(device))
        self.encoder.to(memory_format=torch.channels_last)
        self._tables: dict[tuple[int, int, int, int], Rope] = {}

    def networks(self) -> tuple[Flux2Transformer, Qwen3Encoder]:
        return self.transformer, self.text_encoder

    def compile_blocks(self) -> None:
        """Compile the blocks for the sizes that come most; see ``compiled_for``."""
        blocks = [*self.transformer.double_blocks, *self.transformer.single_blocks]
        for block in [*blocks, *self.text_encoder.layers]:
            block.compile(dynamic=False)

    def latents(self, batch: Batch) -> list[Tensor]:
        """The target and the references as tokens. Shapes: -> each [B, h w, C] bfloat16."""
        with torch.no_grad():
            return [self._encoded(render(scenes)) for scenes in batch.scenes]

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Shapes: [B, 3, H, W] in [0, 1] -> [B, h w, C]."""
        pixels = (pixels * 255).round() / 127.5 - 1  # rounded as a file would be
        pixels = pixels.to(encoding_dtype(pixels.device), memory_format=torch.channels_last)
        at_a_time = max(1, ENCODED_PIXELS // pixels[0, 0].numel())
        parts = [pack(self.encoder.encode(part)) for part in pixels.split(at_a_time)]
        return torch.cat(parts).bfloat16()

    def text_tokens(self, ids: Tensor, count: Tensor) -> Tensor:
        """Prompts as the transformer takes them. Shapes: [B, L], [B] -> [B, L, D]."""
        return self.transformer.text_tokens(self.text_encoder(ids, count))

    def velocity(
        self, noisy: Tensor, references: Sequence[Tensor], txt: Tensor, t: Tensor, kind: Kind
    ) -> Tensor:
        """Shapes: noisy and each reference [B, L, C], txt [B, L_txt, D], t [B] -> [B, L, C]."""
        img = torch.cat((noisy, *references), dim=1)
        modulation = self._modulation(t)
        pe = self._rope(kind, txt.shape[1], len(references), noisy.device)
        return self.transformer(img, txt, modulation, pe, noisy.shape[1])  # type: ignore[no-any-return]

    def _modulation(self, t: Tensor) -> Modulation:
        """As ``Flux2Transformer.modulation``, but one noise level for each example."""
        network = self.transformer
        sinusoids = timestep_embedding(t, network.config.time_channels, torch.float32)
        vec = network.time_out(F.silu(network.time_in(sinusoids)))  # [B, D]
        rows = network.modulations(F.silu(vec)).unflatten(-1, (17, network.config.width))
        rows = rows.transpose(0, 1)[:, :, None]  # [17, B, 1, D]
        return Modulation.of_rows(rows)

    def _rope(self, kind: Kind, text: int, references: int, device: torch.device) -> Rope:
        rows, columns = kind.height // 16, kind.width // 16
        key = (rows, columns, text, references)
        if key not in self._tables:
            ids = torch.zeros(text, 4)
            ids[:, 3] = torch.arange(text)
            grids = [
                torch.cartesian_prod(
                    torch.tensor([float(REFERENCE_SPACING * i)]),
                    torch.arange(float(rows)),
                    torch.arange(float(columns)),
                    torch.zeros(1),
                )
                for i in range(references + 1)
            ]
            config = self.transformer.config
            cos, sin = axial_rope(
                torch.cat([ids, *grids]), config.rope_axes, config.rope_theta, torch.float64
            )
            self._tables[key] = (cos.to(device), sin.to(device))
        return self._tables[key]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def draw(
        self,
        noise: Tensor,
        references: Sequence[Tensor],
        ids: Tensor,
        count: Tensor,
        kind: Kind,
        steps: int,
        guidance: float = 1.0,
        empty: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Euler's way from noise to latents, for a whole batch.

        Args:
            guidance: above 1, away from the picture of the prompt ``empty`` ([1, L], [1]).

        Shapes: noise [B, L, C] -> [B, L, C].
        """
        levels = sigmas("flux", steps, noise.shape[1], 2.0)
        latents = noise
        with autocast(noise.device):
            txt = self.text_tokens(ids, count)
            unguided = None
            if guidance > 1 and empty is not None:
                unguided = self.text_tokens(*empty).expand_as(txt)
            for level, following in pairwise(levels):
                t = torch.full((len(noise),), level, device=noise.device)
                velocity = self.velocity(latents, references, txt, t, kind).float()
                if unguided is not None:
                    other = self.velocity(latents, references, unguided, t, kind).float()
                    velocity = other + guidance * (velocity - other)
                latents = latents + (following - level) * velocity
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, kind: Kind) -> Tensor:
        """Shapes: [B, h w, C] -> [B, 3, H, W] in [0, 1], in steps of 1/255."""
        grid = (kind.height // 16, kind.width // 16)
        pixels = self.vae.decode(unpack(latents.float(), grid))
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round() / 255


def compiled_for(kind: Kind) -> AbstractContextManager[None]:
    """Compiled blocks for the kinds that come most, plain ones for the rest.

    Compiling takes half a minute a size, so it only pays for a size that is used a lot.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance(
        "default" if kind in COMPILED else "force_eager"
    )
    return stance


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; many a processor multiplies it five times as slowly as float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def encoding_dtype(device: torch.device) -> torch.dtype:
    """The same choice for the pictures' encoder, whose convolutions differ tenfold."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def start_like_a_diffusion_transformer(network: Flux2Transformer) -> None:
    """Gates and the last projection start at zero, so that every block starts as the identity.

    Source: Scalable Diffusion Models with Transformers, arXiv 2212.09748 (adaLN-Zero).
    """
    nn.init.zeros_(network.modulations.weight)
    nn.init.zeros_(network.img_out.weight)


def start_like_a_deep_encoder(network: Qwen3Encoder) -> None:
    """What is added to the residual stream starts small, so that 27 layers train."""
    nn.init.normal_(network.embedding.weight, std=0.5)
    with torch.no_grad():
        for layer in network.layers:
            layer.attention.out.weight.mul_(0.3)
            layer.down.weight.mul_(0.3)


def use_kernels(transformer: Flux2Transformer, text_encoder: Qwen3Encoder) -> None:
    """Attention in bfloat16 where autocast is on, and the encoder's over real tokens only."""

    def joint(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return plain_attention(q.to(v.dtype), k.to(v.dtype), v, mask)

    def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None, "the encoder's attention is masked"
        keys = slice(0, LONGEST_PROMPT)  # what comes after is padding, which no query sees
        k, v, mask = k[:, :, keys], v[:, :, keys], mask[..., keys]
        return plain_attention(q.to(v.dtype), k.to(v.dtype), v, mask)

    for block in [*transformer.double_blocks, *transformer.single_blocks]:
        block.attention = joint
    for layer in text_encoder.layers:
        layer.attention.attention = causal
    text_encoder.kernels = replace(text_encoder.kernels, residual_dtype=torch.float32)
    transformer.kernels = replace(transformer.kernels, residual_dtype=torch.float32)
