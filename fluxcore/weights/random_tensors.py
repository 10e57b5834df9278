"""Names, shapes and scales of the tensors of a random checkpoint, and their values.

Owns what each published tensor is called, how large it is and how its values are
spread, so that a model of any size stays sane: every layer's output is of the
order of one, and each part of the model shows in the picture. Knows nothing of
files. It is written apart from the loader's own table of names on purpose: the
one that is wrong is found out by the other.

Source of names and shapes: huggingface/diffusers
src/diffusers/models/transformers/transformer_flux2.py,
src/diffusers/models/autoencoders/autoencoder_kl_flux2.py and vae.py;
huggingface/transformers src/transformers/models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxcore.weights.random_architecture import PATCH_SIZE, Architecture

CHUNK_ELEMENTS = 1 << 15
"""Values drawn at a time. torch starts its threads above this size; for work that is
bound by memory and disk they only cost, on a busy machine several times over."""

NORM_NOISE = 0.1
BIAS_NOISE = 0.1
SILU_RMS = 0.6
"""Root mean square of silu(x) for x of variance one (0.596), and of silu(x) * y."""

ATTENTION_SHARPNESS = 1.5
"""Mean weight of the query and key norms: scores of standard deviation 1.5 ** 2, so
that attention prefers some tokens, as a trained model's does."""

ATTENTION_GAIN = 2.0
"""What a mean over many tokens takes from the attention's output, given back."""

MODULATION = 0.4
"""Standard deviation of shift, scale and gate."""

SLOW_RADIANS = 0.01
"""Sinusoid channels faster than this per unit of timestep (0 to 1000) are damped: in
bf16 a timestep is off by up to 2, which would turn their phase by more than 0.02."""

PIXEL_RMS = 0.5


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its published name, its shape and how its values are spread.

    Attributes:
        std: standard deviation; a tensor has one value for each of the last dimension.
        mean: mean of the values.
        is_counter: an integer that is ``mean`` itself, whatever the checkpoint's dtype.
    """

    name: str
    shape: tuple[int, ...]
    std: float | Tensor
    mean: float = 0.0
    is_counter: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype on disk in a checkpoint of ``dtype``."""
        return torch.int64 if self.is_counter else dtype

    def stored_bytes(self, dtype: torch.dtype) -> int:
        return self.elements * self.stored_dtype(dtype).itemsize


def draw(spec: TensorSpec, dtype: torch.dtype, *, seed: int, component: str) -> Iterator[Tensor]:
    """The values of one tensor, flat, in chunks of whole rows: CHUNK_ELEMENTS or one row.

    They depend on the seed, the component and the name alone, so neither the order
    nor the sharding of a checkpoint changes them. They are uniform, 16 random bits
    each, which is much quicker to draw than normal ones; sums over a
    layer's inputs come out normal all the same.

    Shapes: the chunks together have ``spec.elements`` values.
    """
    if spec.is_counter:
        yield torch.full((spec.elements,), int(spec.mean), dtype=torch.int64)
        return
    digest = hashlib.blake2b(f"{seed}/{component}/{spec.name}".encode(), digest_size=4)
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
    row = spec.shape[-1]
    step = max(1, CHUNK_ELEMENTS // row) * row
    for start in range(0, spec.elements, step):
        count = min(step, spec.elements - start)
        words = torch.empty((count + 3) // 4, dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)
        values = words.view(torch.int16)[:count].float()  # -32768 .. 32767
        values.add_(0.5).mul_(math.sqrt(3) / 32768)  # variance 1
        if isinstance(spec.std, Tensor):
            values.view(-1, row).mul_(spec.std)
        else:
            values.mul_(spec.std)
        yield values.add_(spec.mean).to(dtype)


def transformer_tensors(architecture: Architecture) -> list[TensorSpec]:
    """All tensors of ``transformer/``. Source: diffusers Flux2Transformer2DModel."""
    shape = architecture.transformer
    width, mlp, head = shape.width, shape.mlp_width, shape.attention_head_dim
    embedder = "time_guidance_embed.timestep_embedder"
    specs = [
        TensorSpec(
            f"{embedder}.linear_1.weight",
            (width, shape.timestep_guidance_channels),
            _timestep_std(shape.timestep_guidance_channels),
        ),
        _linear(f"{embedder}.linear_2", width, width, input_rms=SILU_RMS),
        _linear("x_embedder", width, architecture.in_channels),
        _linear("context_embedder", width, architecture.joint_attention_dim),
    ]
    for name, vectors in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
        ("norm_out", 2),
    ):
        specs.append(
            _linear(f"{name}.linear", vectors * width, width, gain=MODULATION, input_rms=SILU_RMS)
        )
    for i in range(shape.num_layers):
        block = f"transformer_blocks.{i}"
        for qkv, norm, out, feed in (
            ("to_{}", "norm_{}", "to_out.0", "ff"),
            ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        ):
            specs += [_linear(f"{block}.attn.{qkv.format(x)}", width, width) for x in "qkv"]
            specs += [_qk_norm(f"{block}.attn.{norm.format(x)}", head) for x in "qk"]
            specs += [
                _linear(f"{block}.attn.{out}", width, width, gain=ATTENTION_GAIN),
                _linear(f"{block}.{feed}.linear_in", 2 * mlp, width),
                _linear(f"{block}.{feed}.linear_out", width, mlp, input_rms=SILU_RMS),
            ]
    for i in range(shape.num_single_layers):
        attn = f"single_transformer_blocks.{i}.attn"
        specs += [
            _linear(f"{attn}.to_qkv_mlp_proj", 3 * width + 2 * mlp, width),
            *(_qk_norm(f"{attn}.norm_{x}", head) for x in "qk"),
            _linear(f"{attn}.to_out", width, width + mlp, input_rms=SILU_RMS),
        ]
    specs.append(_linear("proj_out", architecture.in_channels, width))
    return specs


def text_encoder_tensors(architecture: Architecture) -> list[TensorSpec]:
    """All tensors of ``text_encoder/``. Source: transformers Qwen3ForCausalLM."""
    shape = architecture.text_encoder
    width, mlp, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
    # Each layer adds two branches to the residual stream; damped so that all of them
    # together are about as strong as the embedding.
    damping = 1 / math.sqrt(2 * shape.num_hidden_layers)
    specs = [TensorSpec("model.embed_tokens.weight", (shape.vocab_size, width), 1.0)]
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        attn = f"{layer}.self_attn"
        specs += [
            _norm(f"{layer}.input_layernorm", width),
            _linear(f"{attn}.q_proj", queries, width),
            _linear(f"{attn}.k_proj", keys, width),
            _linear(f"{attn}.v_proj", keys, width),
            _qk_norm(f"{attn}.q_norm", head),
            _qk_norm(f"{attn}.k_norm", head),
            _linear(f"{attn}.o_proj", width, queries, gain=ATTENTION_GAIN * damping),
            _norm(f"{layer}.post_attention_layernorm", width),
            _linear(f"{layer}.mlp.gate_proj", mlp, width),
            _linear(f"{layer}.mlp.up_proj", mlp, width),
            _linear(f"{layer}.mlp.down_proj", width, mlp, gain=damping, input_rms=SILU_RMS),
        ]
    specs.append(_norm("model.norm", width))
    if not shape.tie_word_embeddings:
        specs.append(_linear("lm_head", shape.vocab_size, width))
    return specs


def vae_tensors(architecture: Architecture) -> list[TensorSpec]:
    """All tensors of ``vae/``. Source: diffusers AutoencoderKLFlux2, Encoder, Decoder."""
    shape = architecture.vae
    down, up = shape.block_out_channels, tuple(reversed(shape.decoder_widths))
    latent, depth = shape.latent_channels, shape.layers_per_block
    attention = shape.mid_block_add_attention
    specs = [
        *_conv("encoder.conv_in", down[0], 3),
        *_levels("encoder.down_blocks", "downsamplers", down, depth),
        *_mid_block("encoder.mid_block", down[-1], attention=attention),
        *_affine_norm("encoder.conv_norm_out", down[-1]),
        *_conv("encoder.conv_out", 2 * latent, down[-1], input_rms=SILU_RMS),
        *_conv("decoder.conv_in", up[0], latent),
        *_mid_block("decoder.mid_block", up[0], attention=attention),
        *_levels("decoder.up_blocks", "upsamplers", up, depth + 1),
        *_affine_norm("decoder.conv_norm_out", up[-1]),
        *_conv("decoder.conv_out", 3, up[-1], gain=PIXEL_RMS, input_rms=SILU_RMS),
    ]
    if shape.use_quant_conv:
        specs += _conv("quant_conv", 2 * latent, 2 * latent, kernel=1)
    if shape.use_post_quant_conv:
        specs += _conv("post_quant_conv", latent, latent, kernel=1)
    channels = math.prod(PATCH_SIZE) * latent
    specs += [
        TensorSpec("bn.running_mean", (channels,), 0.3),
        TensorSpec("bn.running_var", (channels,), 0.2, mean=1.0),
        TensorSpec("bn.num_batches_tracked", (), 0.0, mean=1000, is_counter=True),
    ]
    return specs


def _timestep_std(channels: int) -> Tensor:
    """Spread of the timestep embedding's first matrix, by sinusoid channel; [channels].

    Source: huggingface/diffusers src/diffusers/models/embeddings.py,
    get_timestep_embedding: cosines first, frequencies from 1 down to 1/10000.
    """
    half = channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half)  # [channels / 2]
    damping = 1 / (1 + (frequency / SLOW_RADIANS).square())
    both = torch.cat((damping, damping))  # [channels]
    return both / both.square().sum().mul(0.5).sqrt()


def _linear(
    name: str, rows: int, columns: int, *, gain: float = 1.0, input_rms: float = 1.0
) -> TensorSpec:
    """A matrix whose outputs have standard deviation ``gain``."""
    return TensorSpec(f"{name}.weight", (rows, columns), gain / (input_rms * math.sqrt(columns)))


def _norm(name: str, width: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (width,), NORM_NOISE, mean=1.0)


def _qk_norm(name: str, head: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (head,), NORM_NOISE, mean=ATTENTION_SHARPNESS)


def _bias(name: str, width: int) -> TensorSpec:
    return TensorSpec(f"{name}.bias", (width,), BIAS_NOISE)


def _affine_norm(name: str, width: int) -> list[TensorSpec]:
    return [_norm(name, width), _bias(name, width)]


def _conv(
    name: str,
    channels_out: int,
    channels_in: int,
    *,
    kernel: int = 3,
    gain: float = 1.0,
    input_rms: float = 1.0,
) -> list[TensorSpec]:
    std = gain / (input_rms * kernel * math.sqrt(channels_in))
    weight = TensorSpec(f"{name}.weight", (channels_out, channels_in, kernel, kernel), std)
    return [weight, _bias(name, channels_out)]


def _resnet(name: str, channels_in: int, channels_out: int) -> list[TensorSpec]:
    """Source: diffusers ResnetBlock2D."""
    specs = [
        *_affine_norm(f"{name}.norm1", channels_in),
        *_conv(f"{name}.conv1", channels_out, channels_in, input_rms=SILU_RMS),
        *_affine_norm(f"{name}.norm2", channels_out),
        *_conv(f"{name}.conv2", channels_out, channels_out, gain=0.5, input_rms=SILU_RMS),
    ]
    if channels_in != channels_out:
        specs += _conv(f"{name}.conv_shortcut", channels_out, channels_in, kernel=1)
    return specs


def _mid_block(name: str, width: int, *, attention: bool) -> list[TensorSpec]:
    """Source: diffusers UNetMidBlock2D."""
    specs = [*_resnet(f"{name}.resnets.0", width, width)]
    if attention:
        attn = f"{name}.attentions.0"
        specs += _affine_norm(f"{attn}.group_norm", width)
        for part, gain in (
            ("to_q", ATTENTION_SHARPNESS),
            ("to_k", ATTENTION_SHARPNESS),
            ("to_v", 1.0),
            ("to_out.0", ATTENTION_GAIN),
        ):
            specs += [
                _linear(f"{attn}.{part}", width, width, gain=gain),
                _bias(f"{attn}.{part}", width),
            ]
    return specs + _resnet(f"{name}.resnets.1", width, width)


def _levels(name: str, sampler: str, widths: tuple[int, ...], depth: int) -> list[TensorSpec]:
    """Source: diffusers DownEncoderBlock2D and UpDecoderBlock2D."""
    specs = []
    previous = widths[0]
    for i, width in enumerate(widths):
        for j in range(depth):
            specs += _resnet(f"{name}.{i}.resnets.{j}", previous, width)
            previous = width
        if i < len(widths) - 1:
            specs += _conv(f"{name}.{i}.{sampler}.0.conv", width, width)
    return specs
