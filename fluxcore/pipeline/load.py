"""Loading all components of a checkpoint onto one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fluxcore.bundled import is_bundled
from fluxcore.config import (
    CheckpointConfig,
    Qwen3Config,
    TransformerConfig,
    VaeConfig,
    read_checkpoint_config,
)
from fluxcore.errors import CheckpointConfigError, DeviceUnavailableError
from fluxcore.models import AutoEncoder, Flux2Transformer, Qwen3Encoder
from fluxcore.params import LARGEST_DEFAULT_SIDE_PX, MIN_SIDE_PX, SIZE_MULTIPLE
from fluxcore.pipeline.residency import (
    is_narrowed,
    placements,
    stream_layers,
    weights_left_out,
)
from fluxcore.pipeline.result import ModelInfo
from fluxcore.runtime import LayerStream, Runtime
from fluxcore.text import PromptTokenizer
from fluxcore.weights import LoadProgress, check_component, load_component, weight_plan

DISTILLED_STEPS = 4
BASE_STEPS = 50
BASE_GUIDANCE = 4.0

_DIRECTORIES = {VaeConfig: "vae", Qwen3Config: "text_encoder", TransformerConfig: "transformer"}


@dataclass(frozen=True, slots=True)
class Components:
    """The parts of a loaded checkpoint.

    Attributes:
        stream: brings the weights that do not stay; None where all do.
    """

    info: ModelInfo
    config: CheckpointConfig
    tokenizer: PromptTokenizer
    text_encoder: Qwen3Encoder
    transformer: Flux2Transformer
    vae: AutoEncoder
    stream: LayerStream | None


def load_components(
    path: Path, runtime: Runtime, progress: Callable[[LoadProgress], None] | None
) -> Components:
    """Check configs and file headers of all components, then read their weights.

    Raises:
        CheckpointError: naming the file or directory at fault.
        DeviceUnavailableError: precision and residency do not go together.
    """
    if runtime.precision != "bf16" and runtime.residency == "low":
        raise DeviceUnavailableError(
            f"precision {runtime.precision} needs the transformer's weights on the device, and "
            "residency is low; use precision bf16, or residency balanced"
        )
    config = read_checkpoint_config(path)
    tokenizer = PromptTokenizer(path / "tokenizer")
    if tokenizer.largest_id >= config.text_encoder.vocabulary:
        raise CheckpointConfigError(
            f"{path / 'tokenizer'} has token ids up to {tokenizer.largest_id}, the text encoder "
            f"knows {config.text_encoder.vocabulary}; the two are of different models"
        )
    for component in (config.vae, config.text_encoder, config.transformer):
        check_component(weight_plan(component), path / _DIRECTORIES[type(component)])
    kernels = runtime.kernels()
    places, left_out = placements(runtime), weights_left_out(config, runtime.residency)
    vae, vae_report = load_component(
        lambda: AutoEncoder(config.vae, kernels),
        weight_plan(config.vae),
        path / "vae",
        places["vae"],
        progress,
    )
    encoder, encoder_report = load_component(
        lambda: Qwen3Encoder(config.text_encoder, kernels),
        weight_plan(config.text_encoder),
        path / "text_encoder",
        places["text_encoder"],
        progress,
        left_out["text_encoder"],
        place_of(config.text_encoder, runtime),
    )
    transformer, transformer_report = load_component(
        lambda: Flux2Transformer(config.transformer, kernels),
        weight_plan(config.transformer),
        path / "transformer",
        places["transformer"],
        progress,
        left_out["transformer"],
        place_of(config.transformer, runtime),
    )
    runtime.arrange(encoder, transformer, vae)
    stream = stream_layers(path, config, runtime, encoder, transformer)
    reports = (vae_report, encoder_report, transformer_report)
    distilled = config.is_distilled
    info = ModelInfo(
        name=path.resolve().name,
        path=path.resolve(),
        is_bundled=is_bundled(path),
        is_distilled=distilled,
        default_side_px=default_side_px(config.vae),
        default_steps=DISTILLED_STEPS if distilled else BASE_STEPS,
        default_guidance=None if distilled else BASE_GUIDANCE,
        parameters={report.component: report.parameters for report in reports},
        weight_bytes=sum(report.placed_bytes for report in reports)
        + (0 if stream is None else stream.device_bytes),
        load=reports,
    )
    return Components(info, config, tokenizer, encoder, transformer, vae, stream)


def place_of(
    part: Qwen3Config | TransformerConfig, runtime: Runtime
) -> Callable[[nn.Module, str], int]:
    """What brings a parameter into the form that it is multiplied in, as it comes."""

    def place(network: nn.Module, parameter: str) -> int:
        if is_narrowed(part, parameter, runtime, runtime.residency):
            return runtime.quantise(network, parameter)
        return runtime.lay_out(network, parameter)

    return place


def default_side_px(vae: VaeConfig) -> int:
    """What the model is made for, but no more than is drawn in reasonable time everywhere."""
    whole = vae.sample_side_px // SIZE_MULTIPLE * SIZE_MULTIPLE
    return min(max(whole, MIN_SIDE_PX), LARGEST_DEFAULT_SIDE_PX)
