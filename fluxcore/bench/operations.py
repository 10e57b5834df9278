"""What each stage of one picture consists of: matrix products, attention, convolutions.

Owns the counting, from the architecture alone; imports no torch and times nothing. Left
out is everything element by element, which a perfect program would do on the way.
Operations are multiplications and additions, a fused pair counting as two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fluxcore.config import (
    TEXT_TOKENS,
    CheckpointConfig,
    Qwen3Config,
    TransformerConfig,
    VaeConfig,
)


@dataclass(frozen=True, slots=True)
class Product:
    """[rows, inner] times [inner, columns].

    Attributes:
        is_block: part of a transformer block, whose weights may have a precision of their own.
        is_layer: part of a layer of the text encoder, likewise.
    """

    rows: int
    inner: int
    columns: int
    is_block: bool = False
    is_layer: bool = False

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(q k) v over all tokens; masked ones are counted, too.

    Attributes:
        queries: of so many tokens; None: of all.
    """

    heads: int
    kv_heads: int
    tokens: int
    head_width: int
    is_masked: bool = False
    is_vae: bool = False
    queries: int | None = None

    @property
    def operations(self) -> int:
        queries = self.tokens if self.queries is None else self.queries
        return 4 * self.heads * queries * self.tokens * self.head_width


@dataclass(frozen=True, slots=True)
class Convolution:
    """A square kernel at stride 1. ``height`` and ``width`` are those of in- and output."""

    channels_in: int
    channels_out: int
    kernel: int
    height: int
    width: int

    @property
    def operations(self) -> int:
        taps = self.kernel**2
        return 2 * self.channels_in * self.channels_out * taps * self.height * self.width


Part = Product | Attention | Convolution
Work = Counter[Part]


def stage_work(config: CheckpointConfig, width: int, height: int, steps: int) -> dict[str, Work]:
    """The work of one picture without references, by stage.

    Args:
        width, height: pixels.

    Returns:
        ``text``: one prompt. ``text tokens``: its embeddings as the transformer takes them.
        ``schedule``: the modulation vectors of all steps. ``step``: one pass of the
        transformer. ``vae``: the decoder.
    """
    pixels = config.vae.pixels_per_token
    rows, columns = height // pixels, width // pixels
    return {
        "text": text_work(config.text_encoder),
        "text tokens": text_tokens_work(config.transformer),
        "schedule": schedule_work(config.transformer, steps),
        "step": step_work(config.transformer, rows * columns),
        "vae": decoder_work(config.vae, rows, columns),
    }


def operations(work: Work) -> int:
    """All operations of a stage."""
    return sum(part.operations * count for part, count in work.items())


def text_work(config: Qwen3Config) -> Work:
    """The text encoder's used layers on one prompt."""
    tokens, width = TEXT_TOKENS, config.width
    of_heads = config.heads * config.head_width
    of_qkv = of_heads + 2 * config.kv_heads * config.head_width
    layer: list[Part] = [
        Product(tokens, width, of_qkv, is_layer=True),
        Attention(config.heads, config.kv_heads, tokens, config.head_width, is_masked=True),
        Product(tokens, of_heads, width, is_layer=True),
        Product(tokens, width, 2 * config.mlp_width, is_layer=True),
        Product(tokens, config.mlp_width, width, is_layer=True),
    ]
    return _times(config.used_layers, layer)


def text_tokens_work(config: TransformerConfig) -> Work:
    """The transformer's projection of one prompt's embeddings, done once a picture."""
    return Counter([Product(TEXT_TOKENS, config.text_width, config.width)])


def schedule_work(config: TransformerConfig, steps: int) -> Work:
    """Timestep embedding and modulation vectors of all steps."""
    width = config.width
    return Counter(
        [
            Product(steps, config.time_channels, width),
            Product(steps, width, width),
            Product(steps, width, 17 * width),
        ]
    )


def step_work(config: TransformerConfig, image_tokens: int) -> Work:
    """One pass of the transformer."""
    width, mlp, joint = config.width, config.mlp_width, TEXT_TOKENS + image_tokens
    attention = Attention(config.heads, config.heads, joint, config.head_width)
    double: list[Part] = [attention]
    for tokens in (TEXT_TOKENS, image_tokens):
        double += [
            Product(tokens, width, 3 * width, is_block=True),
            Product(tokens, width, width, is_block=True),
            Product(tokens, width, 2 * mlp, is_block=True),
            Product(tokens, mlp, width, is_block=True),
        ]
    before = Product(joint, width, 3 * width + 2 * mlp, is_block=True)
    single: list[Part] = [attention, before, Product(joint, width + mlp, width, is_block=True)]
    # Of the last block only the picture's rows are asked for.
    last: list[Part] = [
        replace(attention, queries=image_tokens),
        before,
        Product(image_tokens, width + mlp, width, is_block=True),
    ]
    ends: list[Part] = [
        Product(image_tokens, config.in_channels, width),
        Product(image_tokens, width, config.out_channels),
    ]
    blocks = _times(config.double_blocks, double) + _times(config.single_blocks - 1, single)
    return blocks + Counter(last + ends)


def decoder_work(config: VaeConfig, rows: int, columns: int) -> Work:
    """The VAE's decoder, from ``rows`` x ``columns`` tokens."""
    patch = config.pixels_per_token // config.pixels_per_latent
    height, width = rows * patch, columns * patch
    widths = tuple(reversed(config.decoder_channels))
    latent, first = config.latent_channels, widths[0]
    parts: list[Part] = [Convolution(latent, first, 3, height, width)]
    if config.post_quant_conv:
        parts.append(Convolution(latent, latent, 1, height, width))
    parts += 2 * _residual(first, first, height, width)
    if config.mid_attention:
        pixels = height * width
        parts += [
            Product(pixels, first, 3 * first),
            Attention(1, 1, pixels, first, is_vae=True),
            Product(pixels, first, first),
        ]
    previous = first
    for i, channels in enumerate(widths):
        parts += _residual(previous, channels, height, width)
        parts += config.layers_per_block * _residual(channels, channels, height, width)
        previous = channels
        if i < len(widths) - 1:
            height, width = 2 * height, 2 * width
            parts.append(Convolution(channels, channels, 3, height, width))
    parts.append(Convolution(previous, config.image_channels, 3, height, width))
    return Counter(parts)


def _residual(channels_in: int, channels_out: int, height: int, width: int) -> list[Part]:
    parts: list[Part] = [
        Convolution(channels_in, channels_out, 3, height, width),
        Convolution(channels_out, channels_out, 3, height, width),
    ]
    if channels_in != channels_out:
        parts.append(Convolution(channels_in, channels_out, 1, height, width))
    return parts


def _times(count: int, parts: Iterable[Part]) -> Work:
    return Counter({part: n * count for part, n in Counter(parts).items()})
