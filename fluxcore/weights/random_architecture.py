"""The architectures that random checkpoints are written in, and their config files.

Owns the numbers that describe a FLUX.2 [klein] model and the JSON that says the
same in the published layout. Knows nothing of weights, files or tokenizers.

Source: huggingface/diffusers src/diffusers/pipelines/flux2/pipeline_flux2_klein.py
and the config files of black-forest-labs/FLUX.2-klein-4B, FLUX.2-klein-9B and
FLUX.2-small-decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fluxcore.config import CONDITIONING_LAYERS, PATCH
from fluxcore.errors import CheckpointConfigError

PATCH_SIZE = (PATCH, PATCH)
"""Latent rows and columns that one image token covers."""

DIFFUSERS_VERSION = "0.37.0.dev0"
TRANSFORMERS_VERSION = "4.57.1"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """Sizes of the FLUX.2 transformer; its input widths follow from the other two models."""

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    axes_dims_rope: tuple[int, int, int, int]
    mlp_ratio: float = 3.0
    timestep_guidance_channels: int = 256
    rope_theta: int = 2000

    @property
    def width(self) -> int:
        """Model width D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Inner width of a block's MLP, after the gate."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderShape:
    """Sizes of the Qwen3 text encoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: int = 1_000_000
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """Sizes of the autoencoder.

    ``decoder_block_out_channels`` is set where the decoder differs; ``sample_size`` is the
    side, in pixels, of the pictures that the model is made for.
    """

    block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    sample_size: int = 1024

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's blocks, finest first."""
        return self.decoder_block_out_channels or self.block_out_channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One FLUX.2 [klein] model: transformer, text encoder and VAE.

    Raises:
        CheckpointConfigError: on construction, where the numbers do not fit together.
    """

    transformer: TransformerShape
    text_encoder: TextEncoderShape
    vae: VaeShape

    def __post_init__(self) -> None:
        transformer, text, vae = self.transformer, self.text_encoder, self.vae
        axes = transformer.axes_dims_rope
        _require(
            sum(axes) == transformer.attention_head_dim and all(axis % 2 == 0 for axis in axes),
            f"axes_dims_rope must be even and add up to attention_head_dim "
            f"{transformer.attention_head_dim}; got {axes}",
        )
        _require(
            transformer.timestep_guidance_channels % 2 == 0,
            f"timestep_guidance_channels must be even; "
            f"got {transformer.timestep_guidance_channels}",
        )
        _require(
            text.num_hidden_layers >= CONDITIONING_LAYERS[-1],
            f"num_hidden_layers must be at least {CONDITIONING_LAYERS[-1]}, the last layer "
            f"that the conditioning reads; got {text.num_hidden_layers}",
        )
        _require(
            text.num_attention_heads % text.num_key_value_heads == 0,
            f"num_attention_heads must be a multiple of num_key_value_heads; "
            f"got {text.num_attention_heads} and {text.num_key_value_heads}",
        )
        _require(text.head_dim % 2 == 0, f"head_dim must be even; got {text.head_dim}")
        _require(
            len(vae.decoder_widths) == len(vae.block_out_channels),
            f"decoder_block_out_channels must have {len(vae.block_out_channels)} entries, "
            f"as block_out_channels has; got {vae.decoder_widths}",
        )
        _require(
            all(w % vae.norm_num_groups == 0 for w in vae.block_out_channels + vae.decoder_widths),
            f"every VAE width must be a multiple of norm_num_groups {vae.norm_num_groups}; "
            f"got {vae.block_out_channels} and {vae.decoder_widths}",
        )

    @property
    def joint_attention_dim(self) -> int:
        """Conditioning width: the concatenated hidden states of the text encoder."""
        return len(CONDITIONING_LAYERS) * self.text_encoder.hidden_size

    @property
    def in_channels(self) -> int:
        """Channels of one image token: a patch of VAE latents."""
        return math.prod(PATCH_SIZE) * self.vae.latent_channels


_PUBLISHED_VAE = VaeShape(block_out_channels=(128, 256, 512, 512))

PRESETS: Mapping[str, Architecture] = MappingProxyType(
    {
        # Small enough for tests, and with every number different from its neighbours':
        # grouped heads, head width x heads unlike the width, layers that are never read.
        "tiny": Architecture(
            transformer=TransformerShape(
                num_layers=2,
                num_single_layers=2,
                num_attention_heads=2,
                attention_head_dim=32,
                axes_dims_rope=(8, 8, 8, 8),
            ),
            text_encoder=TextEncoderShape(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=29,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                vocab_size=576,
                tie_word_embeddings=True,
            ),
            vae=VaeShape(block_out_channels=(16, 24, 32, 32), norm_num_groups=8),
        ),
        "4b": Architecture(
            transformer=TransformerShape(
                num_layers=5,
                num_single_layers=20,
                num_attention_heads=24,
                attention_head_dim=128,
                axes_dims_rope=(32, 32, 32, 32),
            ),
            text_encoder=TextEncoderShape(
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                vocab_size=151_936,
                tie_word_embeddings=True,
            ),
            vae=_PUBLISHED_VAE,
        ),
        "9b": Architecture(
            transformer=TransformerShape(
                num_layers=8,
                num_single_layers=24,
                num_attention_heads=32,
                attention_head_dim=128,
                axes_dims_rope=(32, 32, 32, 32),
            ),
            text_encoder=TextEncoderShape(
                hidden_size=4096,
                intermediate_size=12_288,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                vocab_size=151_936,
                tie_word_embeddings=False,
            ),
            vae=_PUBLISHED_VAE,
        ),
    }
)
"""Architectures by name: ``4b`` and ``9b`` are the published ones, ``tiny`` is for tests."""


def model_index(*, is_distilled: bool) -> dict[str, Any]:
    """Content of ``model_index.json``."""
    return {
        "_class_name": "Flux2KleinPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "is_distilled": is_distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }


def scheduler_config() -> dict[str, Any]:
    """Content of ``scheduler/scheduler_config.json``."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": False,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "shift_terminal": None,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_dynamic_shifting": True,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    }


def transformer_config(architecture: Architecture) -> dict[str, Any]:
    """Content of ``transformer/config.json``."""
    shape = architecture.transformer
    return {
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": shape.attention_head_dim,
        "axes_dims_rope": list(shape.axes_dims_rope),
        "eps": 1e-6,
        "guidance_embeds": False,
        "in_channels": architecture.in_channels,
        "joint_attention_dim": architecture.joint_attention_dim,
        "mlp_ratio": shape.mlp_ratio,
        "num_attention_heads": shape.num_attention_heads,
        "num_layers": shape.num_layers,
        "num_single_layers": shape.num_single_layers,
        "out_channels": None,
        "patch_size": 1,
        "rope_theta": shape.rope_theta,
        "timestep_guidance_channels": shape.timestep_guidance_channels,
    }


def text_encoder_config(
    architecture: Architecture, *, dtype: str, bos_token_id: int, eos_token_id: int
) -> dict[str, Any]:
    """Content of ``text_encoder/config.json``."""
    shape = architecture.text_encoder
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "dtype": dtype,
        "eos_token_id": eos_token_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "layer_types": ["full_attention"] * shape.num_hidden_layers,
        "max_position_embeddings": 40_960,
        "max_window_layers": shape.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def vae_config(architecture: Architecture) -> dict[str, Any]:
    """Content of ``vae/config.json``."""
    shape = architecture.vae
    blocks = len(shape.block_out_channels)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLFlux2",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "batch_norm_eps": shape.batch_norm_eps,
        "batch_norm_momentum": 0.1,
        "block_out_channels": list(shape.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": shape.latent_channels,
        "layers_per_block": shape.layers_per_block,
        "mid_block_add_attention": shape.mid_block_add_attention,
        "norm_num_groups": shape.norm_num_groups,
        "out_channels": 3,
        "patch_size": list(PATCH_SIZE),
        "sample_size": shape.sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_post_quant_conv": shape.use_post_quant_conv,
        "use_quant_conv": shape.use_quant_conv,
    }
    if shape.decoder_block_out_channels is not None:
        config["decoder_block_out_channels"] = list(shape.decoder_block_out_channels)
    return config
