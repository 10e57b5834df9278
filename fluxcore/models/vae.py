"""The autoencoder: pixels to latents and back.

Patching and batch-norm statistics live here too (``to_tokens``, ``from_tokens``),
because they belong to the latent space and not to the pipeline.

Source: diffusers models/autoencoders/autoencoder_kl_flux2.py, vae.py and
pipelines/flux2/pipeline_flux2_klein.py (_encode_vae_image, _patchify_latents).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcore.config import PATCH, VaeConfig
from fluxcore.kernels import Kernels

NORM_EPS = 1e-6


def normed(x: Tensor, norm: nn.GroupNorm, *, silu: bool = True) -> Tensor:
    """A group norm, and SiLU of it. Shapes: [B, C, h, w] -> the same."""
    return F.silu(norm(x)) if silu else norm(x)


def residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """What a residual block does. Shapes: [B, C_in, h, w] -> [B, C_out, h, w]."""
    hidden = block.conv1(block.normed(x, block.norm1))
    hidden = block.conv2(block.normed(hidden, block.norm2))
    return (x if block.shortcut is None else block.shortcut(x)) + hidden  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two normed 3x3 convolutions around a shortcut.

    Shapes: [B, C_in, h, w] -> [B, C_out, h, w].
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int, kernels: Kernels) -> None:
        super().__init__()
        self.normed = kernels.normed or normed
        self.run = kernels.residual_block or residual_block
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = (
            nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels.

    Shapes: [B, C, h, w] -> [B, C, h, w].
    """

    def __init__(self, channels: int, groups: int, kernels: Kernels) -> None:
        super().__init__()
        self.attention = kernels.vae_attention
        self.normed = kernels.normed or normed
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        hidden = self.normed(x, self.norm, silu=False).flatten(2).transpose(1, 2)  # [B, h w, C]
        q, k, v = self.qkv(hidden)[:, None].chunk(3, dim=-1)  # [B, 1, h w, C]
        hidden = self.out(self.attention(q, k, v, None)[:, 0])  # [B, h w, C]
        return x + hidden.transpose(1, 2).unflatten(2, (height, -1))  # type: ignore[no-any-return]


class MiddleBlock(nn.Module):
    """Residual, attention (if the config has it), residual. Shapes: unchanged."""

    def __init__(self, channels: int, config: VaeConfig, kernels: Kernels) -> None:
        super().__init__()
        groups = config.norm_groups
        self.first = ResidualBlock(channels, channels, groups, kernels)
        self.attention = AttentionBlock(channels, groups, kernels) if config.mid_attention else None
        self.second = ResidualBlock(channels, channels, groups, kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.attention is not None:
            x = self.attention(x)
        return self.second(x)  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one resolution, and the convolution after a change of resolution."""

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        groups: int,
        resample: nn.Module | None,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(i, o, groups, kernels) for i, o in sizes)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Downsample(nn.Module):
    """Halve each side. Shapes: [B, C, h, w] -> [B, C, h/2, w/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double each side. Shapes: [B, C, h, w] -> [B, C, 2 h, 2 w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        # Another form where weights are laid out for it.
        self.fused: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return self.fused(x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Pixels to moments. Shapes: [B, 3, 8 h, 8 w] -> [B, 2 C, h, w] (for four levels)."""

    def __init__(self, config: VaeConfig, kernels: Kernels) -> None:
        super().__init__()
        widths = config.encoder_channels
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            sizes = [(previous, width)] + [(width, width)] * (config.layers_per_block - 1)
            resample = Downsample(width) if i < len(widths) - 1 else None
            self.levels.append(Level(sizes, config.norm_groups, resample, kernels))
            previous = width
        self.middle = MiddleBlock(previous, config, kernels)
        self.normed = kernels.normed or normed
        self.norm_out = nn.GroupNorm(config.norm_groups, previous, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(previous, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return self.conv_out(self.normed(x, self.norm_out))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents to pixels. Shapes: [B, C, h, w] -> [B, 3, 8 h, 8 w] (for four levels)."""

    def __init__(self, config: VaeConfig, kernels: Kernels) -> None:
        super().__init__()
        widths = tuple(reversed(config.decoder_channels))
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = MiddleBlock(widths[0], config, kernels)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            sizes = [(previous, width)] + [(width, width)] * config.layers_per_block
            resample = Upsample(width) if i < len(widths) - 1 else None
            self.levels.append(Level(sizes, config.norm_groups, resample, kernels))
            previous = width
        self.normed = kernels.normed or normed
        self.norm_out = nn.GroupNorm(config.norm_groups, previous, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(previous, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(self.normed(x, self.norm_out))  # type: ignore[no-any-return]


class AutoEncoder(nn.Module):
    """Pictures to normalised, patched latents, and back.

    Pixels lie in [-1, 1], [B, 3, 16 h, 16 w]; latents are [B, 4 C, h, w].
    """

    latent_mean: Tensor
    latent_variance: Tensor

    def __init__(self, config: VaeConfig, kernels: Kernels) -> None:
        super().__init__()
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, kernels)
        self.decoder = Decoder(config, kernels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else None
        self.register_buffer("latent_mean", torch.zeros(config.token_channels))
        self.register_buffer("latent_variance", torch.ones(config.token_channels))

    def encode(self, pixels: Tensor) -> Tensor:
        """The mode of the latent distribution, normalised.

        Shapes: [B, 3, 16 h, 16 w] -> [B, 4 C, h, w].
        """
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        latents = patchify(moments.chunk(2, dim=1)[0])  # the mean is the mode
        return (latents - self._mean(latents)) / self._deviation(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Shapes: [B, 4 C, h, w] -> [B, 3, 16 h, 16 w]."""
        z = unpatchify(latents * self._deviation(latents) + self._mean(latents))
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z)  # type: ignore[no-any-return]

    def _mean(self, like: Tensor) -> Tensor:
        return self.latent_mean[None, :, None, None].to(like.dtype)

    def _deviation(self, like: Tensor) -> Tensor:
        variance = self.latent_variance + self.config.batch_norm_eps
        return variance.sqrt()[None, :, None, None].to(like.dtype)


def patchify(latents: Tensor) -> Tensor:
    """Gather 2 x 2 patches into channels. Shapes: [B, C, 2 h, 2 w] -> [B, 4 C, h, w]."""
    return F.pixel_unshuffle(latents, PATCH)


def unpatchify(latents: Tensor) -> Tensor:
    """Undo ``patchify``. Shapes: [B, 4 C, h, w] -> [B, C, 2 h, 2 w]."""
    return F.pixel_shuffle(latents, PATCH)
