"""The demo model: a FLUX.2 [klein] of 16 million parameters.

Owns its numbers, and how any architecture becomes networks to train. Everything
that a klein model has is there, only thin: 27 encoder layers, because the
conditioning reads the hidden states 9, 18 and 27, and double and single blocks.

    python -m demo.architecture     prints what it weighs
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fluxcore.config import CheckpointConfig, read_checkpoint_config
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.models import AutoEncoder, Flux2Transformer, Qwen3Encoder
from fluxcore.weights.layout import write_json
from fluxcore.weights.random_architecture import (
    Architecture,
    TextEncoderShape,
    TransformerShape,
    VaeShape,
    model_index,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)

LARGEST_BYTES = 32 * 2**20
"""What the whole checkpoint may weigh, tokenizer included: it ships in the package."""

LARGEST_FILE_BYTES = 20 * 2**20

DEMO = Architecture(
    transformer=TransformerShape(
        num_layers=3,
        num_single_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        axes_dims_rope=(16, 16, 16, 16),
        mlp_ratio=3.0,
        timestep_guidance_channels=256,
    ),
    text_encoder=TextEncoderShape(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=27,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        vocab_size=1024,
        tie_word_embeddings=True,
    ),
    vae=VaeShape(
        block_out_channels=(24, 48, 64, 96),
        decoder_block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    ),
)


def write_configs(
    directory: Path,
    architecture: Architecture,
    *,
    is_distilled: bool = True,
    bos_token_id: int = 0,
    eos_token_id: int = 0,
) -> None:
    """Write every config file of a checkpoint but the tokenizer's.

    Differs from the published ones: the text encoder's says float32, whatever is on disk.
    With no dtype asked for, transformers follows that field while diffusers loads the
    other two networks in float32, and a bfloat16 conditioning would not fit them.
    """
    text = text_encoder_config(
        architecture, dtype="float32", bos_token_id=bos_token_id, eos_token_id=eos_token_id
    )
    for name, content in (
        ("transformer/config.json", transformer_config(architecture)),
        ("text_encoder/config.json", text),
        ("vae/config.json", vae_config(architecture)),
        ("scheduler/scheduler_config.json", scheduler_config()),
        ("model_index.json", model_index(is_distilled=is_distilled)),
    ):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)


def read_config(architecture: Architecture) -> CheckpointConfig:
    """The architecture as the networks take it: what a reader makes of its own files."""
    with tempfile.TemporaryDirectory() as written:
        write_configs(Path(written), architecture)
        return read_checkpoint_config(Path(written))


def build_modules(
    architecture: Architecture,
) -> tuple[Flux2Transformer, Qwen3Encoder, AutoEncoder]:
    """The three networks in float32 on the CPU, to be trained.

    Every parameter has PyTorch's own random start, drawn from the global generator;
    zeroed gates and the like are the trainer's business.
    """
    config = read_config(architecture)
    kernels = Kernels(attention=plain_attention, vae_attention=plain_attention)
    with torch.device("cpu"):
        return (
            Flux2Transformer(config.transformer, kernels).float(),
            Qwen3Encoder(config.text_encoder, kernels).float(),
            AutoEncoder(config.vae, kernels).float(),
        )


def main() -> None:
    """Print parameters and bytes of each part."""
    total = 0
    names = ("transformer", "text encoder", "vae")
    for name, network in zip(names, build_modules(DEMO), strict=True):
        count = sum(parameter.numel() for parameter in network.parameters())
        total += count
        print(f"{name:13} {count:11,} parameters {2 * count / 2**20:6.2f} MiB in bf16")
    print(f"{'all':13} {total:11,} parameters {2 * total / 2**20:6.2f} MiB in bf16")


if __name__ == "__main__":
    main()
