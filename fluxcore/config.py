"""The architecture of a checkpoint, read from its own config files.

Owns the parsing of ``model_index.json`` and of each component's config. A
directory's name is never looked at; a field that this code does not implement
is an error, never ignored. Imports no torch.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fluxcore.errors import CheckpointConfigError, CheckpointNotFoundError

T = TypeVar("T")

TEXT_TOKENS = 512
"""Every prompt is padded or cut to this many tokens (Flux2KleinPipeline's default)."""

CONDITIONING_LAYERS = (9, 18, 27)
"""Hidden states of the encoder that make the conditioning; the embedding counts as 0."""

PATCH = 2
"""Side of the latent patches that become one token."""


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes of the FLUX.2 transformer (``transformer/config.json``)."""

    in_channels: int
    out_channels: int
    double_blocks: int
    single_blocks: int
    heads: int
    head_width: int
    text_width: int
    mlp_ratio: float
    rope_axes: tuple[int, ...]
    rope_theta: float
    time_channels: int
    norm_eps: float

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """Sizes of the text encoder (``text_encoder/config.json``)."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    rope_theta: float
    norm_eps: float

    @property
    def used_layers(self) -> int:
        """Layers that the conditioning needs; the ones above are never read from disk."""
        return max(CONDITIONING_LAYERS)

    @property
    def final_norm(self) -> bool:
        """Whether the last conditioning layer is the model's last, whose hidden state
        transformers gives out normed."""
        return self.layers == self.used_layers

    @property
    def conditioning_width(self) -> int:
        return len(CONDITIONING_LAYERS) * self.width


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Sizes of the autoencoder (``vae/config.json``).

    Attributes:
        sample_side_px: side of the pictures that the model is made for.
    """

    image_channels: int
    latent_channels: int
    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    batch_norm_eps: float
    sample_side_px: int

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels one latent covers on each side, before patching."""
        side: int = 2 ** (len(self.encoder_channels) - 1)
        return side

    @property
    def pixels_per_token(self) -> int:
        return self.pixels_per_latent * PATCH

    @property
    def token_channels(self) -> int:
        return self.latent_channels * PATCH * PATCH


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """Everything that the config files of one checkpoint directory say."""

    directory: Path
    is_distilled: bool
    transformer: TransformerConfig
    text_encoder: Qwen3Config
    vae: VaeConfig


def read_checkpoint_config(directory: Path) -> CheckpointConfig:
    """Read and cross-check the config files of a checkpoint directory.

    Raises:
        CheckpointNotFoundError: the directory or one of the files is not there.
        CheckpointConfigError: a file is unreadable, or describes something else
            than a FLUX.2 [klein] model.
    """
    if not directory.is_dir():
        raise CheckpointNotFoundError(
            f"no checkpoint directory at {directory}; expected the layout of "
            "black-forest-labs/FLUX.2-klein-4B (model_index.json, transformer/, text_encoder/, "
            "vae/, tokenizer/, scheduler/)"
        )
    index = ConfigFile(directory / "model_index.json")
    index.expect("_class_name", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
    config = CheckpointConfig(
        directory=directory,
        is_distilled=index.get("is_distilled", bool, False),
        transformer=_read_transformer(ConfigFile(directory / "transformer" / "config.json")),
        text_encoder=_read_qwen3(ConfigFile(directory / "text_encoder" / "config.json")),
        vae=_read_vae(ConfigFile(directory / "vae" / "config.json")),
    )
    _check_scheduler(ConfigFile(directory / "scheduler" / "scheduler_config.json"))
    _check_fit(config)
    return config


class ConfigFile:
    """One JSON object on disk, with typed access that names the file on error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise CheckpointNotFoundError(
                f"{path} is missing; give the directory of a model in the layout of "
                "black-forest-labs/FLUX.2-klein-4B, or download it again if it is incomplete"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointConfigError(f"{path} cannot be read: {error}") from error
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointConfigError(
                f"{path} is not valid JSON ({error}); download it again"
            ) from error
        if not isinstance(values, dict):
            raise CheckpointConfigError(f"{path} must hold a JSON object; got a {type(values)}")
        self.values: dict[str, Any] = values

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """The value of a field, which must be of ``kind``; an int passes as a float."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise CheckpointConfigError(f"{self.path}: the field {name!r} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            with suppress(OverflowError):  # refused below
                return kind(value)  # type: ignore[call-arg]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointConfigError(
                f"{self.path}: {name!r} must be of type {kind.__name__}; got {value!r}"
            )
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.get(name, int, default)
        if value < 1:
            raise CheckpointConfigError(f"{self.path}: {name!r} must be at least 1; got {value}")
        return value

    def positive_number(self, name: str, default: float) -> float:
        value = self.get(name, float, default)
        if not (0 < value < math.inf):
            raise CheckpointConfigError(
                f"{self.path}: {name!r} must be a finite number above 0; got {value}"
            )
        return value

    def integers(self, name: str, default: list[int] | None = None) -> tuple[int, ...]:
        values = self.get(name, list, default)
        if not values or not all(type(v) is int and v > 0 for v in values):
            raise CheckpointConfigError(
                f"{self.path}: {name!r} must be a list of positive integers; got {values!r}"
            )
        return tuple(values)

    def expect(self, name: str, *allowed: object, default: object = None) -> None:
        """Require one of the values that this code implements.

        Args:
            default: what an absent field means to the reference; None lets it pass.
        """
        value = self.values.get(name, default)
        if value is not None and not any(_same(value, a) for a in allowed):
            expected = " or ".join(repr(a) for a in allowed)
            raise CheckpointConfigError(
                f"{self.path}: {name!r} must be {expected} for a FLUX.2 [klein] model; "
                f"got {value!r}"
            )


def _same(value: object, allowed: object) -> bool:
    """Equal, and both or neither a bool: in Python, True == 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _read_transformer(file: ConfigFile) -> TransformerConfig:
    file.expect("_class_name", "Flux2Transformer2DModel")
    file.expect("patch_size", 1)
    file.expect("guidance_embeds", False, default=True)
    file.expect("quantization_config", None)
    in_channels = file.positive("in_channels", 128)
    config = TransformerConfig(
        in_channels=in_channels,
        out_channels=file.positive("out_channels", in_channels),
        double_blocks=file.positive("num_layers"),
        single_blocks=file.positive("num_single_layers"),
        heads=file.positive("num_attention_heads"),
        head_width=file.positive("attention_head_dim", 128),
        text_width=file.positive("joint_attention_dim"),
        mlp_ratio=file.positive_number("mlp_ratio", 3.0),
        rope_axes=file.integers("axes_dims_rope", [32, 32, 32, 32]),
        rope_theta=file.positive_number("rope_theta", 2000.0),
        time_channels=file.positive("timestep_guidance_channels", 256),
        norm_eps=file.positive_number("eps", 1e-6),
    )
    axes = config.rope_axes
    if len(axes) != 4 or sum(axes) != config.head_width or any(a % 2 for a in axes):
        raise CheckpointConfigError(
            f"{file.path}: 'axes_dims_rope' must be four even numbers that add up to "
            f"'attention_head_dim' ({config.head_width}); got {list(axes)}"
        )
    if config.mlp_width < 1:
        raise CheckpointConfigError(
            f"{file.path}: 'mlp_ratio' times the width ({config.width}) must be at least 1; "
            f"got {config.mlp_ratio}"
        )
    if config.time_channels % 2:
        raise CheckpointConfigError(
            f"{file.path}: 'timestep_guidance_channels' must be even; got {config.time_channels}"
        )
    return config


def _read_qwen3(file: ConfigFile) -> Qwen3Config:
    file.expect("model_type", "qwen3")
    file.expect("hidden_act", "silu")
    file.expect("attention_bias", False)
    file.expect("use_sliding_window", False)
    file.expect("quantization_config", None)
    if set(file.get("layer_types", list, [])) - {"full_attention"}:
        raise CheckpointConfigError(
            f"{file.path}: 'layer_types' must all be 'full_attention' for a FLUX.2 [klein] model"
        )
    width = file.positive("hidden_size")
    heads = file.positive("num_attention_heads")
    config = Qwen3Config(
        vocabulary=file.positive("vocab_size"),
        width=width,
        mlp_width=file.positive("intermediate_size"),
        layers=file.positive("num_hidden_layers"),
        heads=heads,
        kv_heads=file.positive("num_key_value_heads", heads),
        head_width=file.positive("head_dim", max(1, width // heads)),
        rope_theta=_qwen3_rope_theta(file),
        norm_eps=file.positive_number("rms_norm_eps", 1e-6),
    )
    if config.layers < config.used_layers:
        raise CheckpointConfigError(
            f"{file.path}: 'num_hidden_layers' must be at least {config.used_layers}, because the "
            f"conditioning reads hidden states {CONDITIONING_LAYERS}; got {config.layers}"
        )
    if config.heads % config.kv_heads or config.head_width % 2:
        raise CheckpointConfigError(
            f"{file.path}: 'num_attention_heads' ({config.heads}) must be a multiple of "
            f"'num_key_value_heads' ({config.kv_heads}), and 'head_dim' ({config.head_width}) even"
        )
    return config


def _qwen3_rope_theta(file: ConfigFile) -> float:
    """transformers 5 writes ``rope_parameters``, version 4 ``rope_theta`` and ``rope_scaling``."""
    parameters = file.get("rope_parameters", dict, {})
    for name in ("rope_parameters", "rope_scaling"):
        given = file.get(name, dict, {})
        plain = given.get("rope_type", given.get("type", "default")) == "default"
        if not plain or given.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointConfigError(
                f"{file.path}: {name!r} must be of rope_type 'default', over whole heads; "
                f"got {given!r}"
            )
    theta = parameters.get("rope_theta") or file.values.get("rope_theta")
    if (
        not isinstance(theta, (int, float))
        or isinstance(theta, bool)
        or not 0 < theta <= sys.float_info.max
    ):
        raise CheckpointConfigError(
            f"{file.path}: 'rope_theta' must be a finite number above 0; got {theta!r}"
        )
    return float(theta)


def _read_vae(file: ConfigFile) -> VaeConfig:
    file.expect("_class_name", "AutoencoderKLFlux2")
    file.expect("act_fn", "silu")
    file.expect("patch_size", [PATCH, PATCH])
    encoder = file.integers("block_out_channels", [128, 256, 512, 512])
    file.expect("down_block_types", ["DownEncoderBlock2D"] * len(encoder))
    file.expect("up_block_types", ["UpDecoderBlock2D"] * len(encoder))
    config = VaeConfig(
        image_channels=file.positive("in_channels", 3),
        latent_channels=file.positive("latent_channels", 32),
        encoder_channels=encoder,
        decoder_channels=file.integers("decoder_block_out_channels", list(encoder)),
        layers_per_block=file.positive("layers_per_block", 2),
        norm_groups=file.positive("norm_num_groups", 32),
        mid_attention=file.get("mid_block_add_attention", bool, True),
        quant_conv=file.get("use_quant_conv", bool, True),
        post_quant_conv=file.get("use_post_quant_conv", bool, True),
        batch_norm_eps=file.positive_number("batch_norm_eps", 1e-4),
        sample_side_px=file.positive("sample_size", 1024),
    )
    file.expect("in_channels", 3)
    file.expect("out_channels", 3)
    if len(config.decoder_channels) != len(encoder):
        raise CheckpointConfigError(
            f"{file.path}: 'decoder_block_out_channels' must have as many entries as "
            f"'block_out_channels' ({len(encoder)}); got {list(config.decoder_channels)}"
        )
    if any(c % config.norm_groups for c in encoder + config.decoder_channels):
        raise CheckpointConfigError(
            f"{file.path}: every width must be a multiple of 'norm_num_groups' "
            f"({config.norm_groups}); got {list(encoder)} and {list(config.decoder_channels)}"
        )
    return config


def _check_scheduler(file: ConfigFile) -> None:
    """Only the schedule that all published klein models use is implemented."""
    file.expect("_class_name", "FlowMatchEulerDiscreteScheduler")
    file.expect("use_dynamic_shifting", True, default=False)
    file.expect("time_shift_type", "exponential")
    file.expect("num_train_timesteps", 1000)
    for name in (
        "invert_sigmas",
        "stochastic_sampling",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    ):
        file.expect(name, False)
    file.expect("shift_terminal", None, 0)


def _check_fit(config: CheckpointConfig) -> None:
    """The three components must fit together."""
    directory = config.directory
    if config.transformer.text_width != config.text_encoder.conditioning_width:
        raise CheckpointConfigError(
            f"{directory}: the transformer takes a conditioning of width "
            f"{config.transformer.text_width}, the text encoder gives "
            f"{config.text_encoder.conditioning_width}; the two are of different models"
        )
    tokens = {config.transformer.in_channels, config.transformer.out_channels}
    if tokens != {config.vae.token_channels}:
        raise CheckpointConfigError(
            f"{directory}: the transformer works on tokens of {sorted(tokens)} channels, "
            f"the VAE gives {config.vae.token_channels}; the two are of different models"
        )
    if config.vae.pixels_per_token != 16:
        raise CheckpointConfigError(
            f"{directory}: one token must cover 16 x 16 pixels; this VAE's covers "
            f"{config.vae.pixels_per_token}"
        )
