"""Which of a checkpoint's weights stay on the device, and what that takes.

Owns the places of all parameters, the order in which layers that do not stay are used,
and the estimate of memory that the choice is made by.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from fluxcore.config import (
    TEXT_TOKENS,
    CheckpointConfig,
    Qwen3Config,
    TransformerConfig,
    VaeConfig,
)
from fluxcore.models import Flux2Transformer, Qwen3Encoder
from fluxcore.params import SIZE_MULTIPLE
from fluxcore.runtime import (
    WAYS,
    LayerStream,
    Residency,
    Runtime,
    choose_residency,
    host_available_bytes,
)
from fluxcore.weights import Placement, stored_embedding, streamed_layers, weight_plan

logger = logging.getLogger(__name__)

RESIDUAL_NORMS = ("attention_norm.weight", "mlp_norm.weight", "final_norm.weight")
EMBEDDING = "embedding"
BLOCKS = ("double_blocks.", "single_blocks.")
LAYERS = "layers."
"""Beginnings of the transformer's and the encoder's parameters whose matrices may be in eight bits.
"""
STREAM_BUFFERS = 2
HOST_SHARE = 0.7
"""Of the host's free memory, what layers may take that are kept there for a CUDA device."""
OVERHEAD_BYTES = 500 * 10**6
"""The framework itself, its kernels and workspaces."""


def placements(runtime: Runtime) -> dict[str, Placement]:
    """Where and as what each component's parameters are kept."""
    device, dtypes = runtime.device, runtime.dtypes
    residual = dtypes.residual or dtypes.weights
    return {
        "vae": Placement(device, dtypes.vae, channels_last=runtime.channels_last),
        "text_encoder": Placement(device, dtypes.weights, wide=RESIDUAL_NORMS, wide_dtype=residual),
        "transformer": Placement(device, dtypes.weights),
    }


def is_narrowed(
    part: Qwen3Config | TransformerConfig | VaeConfig,
    parameter: str,
    runtime: Runtime,
    residency: Residency,
) -> bool:
    """Whether a parameter is put into eight bits, if it is a matrix."""
    match part:
        case TransformerConfig():
            return runtime.precision != "bf16" and parameter.startswith(BLOCKS)
        case Qwen3Config():
            narrow = runtime.precision_of_encoder(residency) != "bf16"
            return narrow and parameter.startswith(LAYERS)
    return False


def streamed_names(config: CheckpointConfig, residency: Residency) -> dict[str, list[str]]:
    """Submodules of each component that come and go, in the order of their use."""
    encoder = [f"layers.{i}" for i in range(config.text_encoder.used_layers)]
    transformer = [
        "modulations",
        *(f"double_blocks.{i}" for i in range(config.transformer.double_blocks)),
        *(f"single_blocks.{i}" for i in range(config.transformer.single_blocks)),
    ]
    return {
        "text_encoder": [] if residency == "resident" else encoder,
        "transformer": transformer if residency == "low" else [],
    }


def weights_left_out(config: CheckpointConfig, residency: Residency) -> dict[str, tuple[str, ...]]:
    """Beginnings of the names of parameters that are not placed."""
    names = streamed_names(config, residency)
    if names["text_encoder"]:
        names["text_encoder"].append(EMBEDDING)
    return {part: tuple(f"{name}." for name in left) for part, left in names.items()}


def stream_layers(
    path: Path,
    config: CheckpointConfig,
    runtime: Runtime,
    encoder: Qwen3Encoder,
    transformer: Flux2Transformer,
) -> LayerStream | None:
    """Let the layers that do not stay come in turn; None where all stay."""
    names, places = streamed_names(config, runtime.residency), placements(runtime)
    if not names["text_encoder"]:
        return None
    plan = weight_plan(config.text_encoder)
    directory, place = path / "text_encoder", places["text_encoder"]
    encoder.embedding = stored_embedding(plan, directory, place, EMBEDDING)
    layers = streamed_layers(
        encoder, plan, directory, place, names["text_encoder"], runtime.ordering
    )
    encoder_layers = len(layers)
    following = [*range(1, encoder_layers), 0]
    if names["transformer"]:
        layers += streamed_layers(
            transformer,
            weight_plan(config.transformer),
            path / "transformer",
            places["transformer"],
            names["transformer"],
            runtime.ordering,
        )
        # After a prompt the modulations come, and after the last block the next step's first.
        following = [*range(1, len(layers)), encoder_layers + 1]
    streamed_bytes = sum(layer.bytes for layer in layers)
    on_host = runtime.kind == "cuda" and streamed_bytes < HOST_SHARE * host_available_bytes()
    return LayerStream(layers, following, runtime.device, keep_on_host=on_host)


def settle_residency(
    asked: str, config: CheckpointConfig, runtime: Runtime, side_px: int
) -> Runtime:
    """The runtime with the residency that was asked for, or the first that fits.

    Args:
        asked: auto, resident, balanced or low.
        side_px: of the pictures that there should be memory for.

    Raises:
        DeviceUnavailableError: there is no such residency.
    """
    needs = memory_needs(config, runtime, side_px)
    choice = choose_residency(asked, needs, runtime.available_bytes())
    logger.log(logging.WARNING if choice.is_tight else logging.INFO, "%s", choice.reason)
    return replace(runtime, residency=choice.residency)


def memory_needs(config: CheckpointConfig, runtime: Runtime, side_px: int) -> dict[Residency, int]:
    """Bytes on the device that each residency takes while one picture is drawn."""
    work = work_bytes(config, runtime, side_px) + OVERHEAD_BYTES
    return {way: weight_bytes(config, runtime, way) + work for way in WAYS}


def weight_bytes(config: CheckpointConfig, runtime: Runtime, residency: Residency) -> int:
    """Weights that stay, and the buffers for those that do not."""
    places, left_out = placements(runtime), weights_left_out(config, residency)
    streamed = streamed_names(config, residency)
    staying, largest = 0, 0
    for part in (config.vae, config.text_encoder, config.transformer):
        name = next(key for key in places if getattr(config, key) is part)
        plan, place = weight_plan(part), places[name]
        sizes = {
            parameter: plan.elements(parameter)
            * (
                1
                if is_narrowed(part, parameter, runtime, residency)
                else place.dtype_of(parameter).itemsize
            )
            for parameter in plan.parts
        }
        away = left_out.get(name, ())
        staying += sum(size for key, size in sizes.items() if not key.startswith(away or "\0"))
        for layer in streamed.get(name, ()):
            of_layer = (size for key, size in sizes.items() if key.startswith(f"{layer}."))
            largest = max(largest, sum(of_layer))
    return staying + STREAM_BUFFERS * largest


def work_bytes(config: CheckpointConfig, runtime: Runtime, side_px: int) -> int:
    """What drawing one square picture takes besides the weights; an estimate from above.

    Counted are what a single block holds at once (its projections, their rotated float32
    forms, the MLP's product and the joined rows) and four pictures of the decoder's widest
    full-size layer.
    """
    transformer, vae = config.transformer, config.vae
    tokens = TEXT_TOKENS + (side_px // SIZE_MULTIPLE) ** 2
    row = 6 * transformer.width + 4 * transformer.mlp_width
    rotated = 4 * transformer.width * 4
    denoise = tokens * (row * runtime.dtypes.weights.itemsize + rotated)
    widest = max(vae.decoder_channels[:2])
    decode = 4 * widest * side_px**2 * runtime.dtypes.vae.itemsize
    own = 0 if runtime.amx is None else runtime.amx.work_bytes(tokens, transformer.head_width)
    return max(denoise + own, decode)
