"""From trained networks to a checkpoint in the published layout.

Owns the way back of ``fluxcore.weights``: fused parameters are cut into the
published tensors and written as safetensors, with every file that diffusers needs
beside them. Needs torch and safetensors alone.

Source: the directory layout of black-forest-labs/FLUX.2-klein-4B on Hugging Face.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from demo.architecture import read_config, write_configs
from fluxcore.errors import CheckpointConfigError
from fluxcore.models import AutoEncoder, Flux2Transformer, Qwen3Encoder
from fluxcore.weights import WeightPlan, weight_plan
from fluxcore.weights.layout import STEMS, appearing_whole, shard_names, split_by_size, write_index
from fluxcore.weights.random_architecture import Architecture

SHARD_BYTES = 19_000_000
PAD_TOKEN = "<|endoftext|>"
END_TOKEN = "<|im_end|>"
BATCH_COUNT = "bn.num_batches_tracked"
"""A counter of batch-norm's that diffusers expects, and that nothing reads."""


def export_checkpoint(
    directory: str | os.PathLike[str],
    architecture: Architecture,
    transformer: Flux2Transformer,
    text_encoder: Qwen3Encoder,
    vae: AutoEncoder,
    tokenizer_directory: str | os.PathLike[str],
    *,
    is_distilled: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint that fluxcore and ``diffusers.Flux2KleinPipeline`` load as it is.

    Args:
        directory: where to; must not exist yet, or be empty.
        architecture: what the networks were built from.
        tokenizer_directory: a ``tokenizer/`` that was trained; copied.
        is_distilled: a model of few steps, without guidance.
        dtype: of all weights on disk, the latents' mean and variance included.
        max_shard_bytes: weights in one file at most.

    Returns:
        The directory.

    Raises:
        CheckpointError: the directory holds something already.
        CheckpointConfigError: the networks or the tokenizer do not fit the architecture.
    """
    target, tokenizer = Path(directory), Path(tokenizer_directory)
    added = _check_tokenizer(tokenizer, architecture.text_encoder.vocab_size)
    config = read_config(architecture)
    parts = (
        ("transformer", published_tensors(weight_plan(config.transformer), transformer, dtype)),
        ("text_encoder", published_tensors(weight_plan(config.text_encoder), text_encoder, dtype)),
        ("vae", published_tensors(weight_plan(config.vae), vae, dtype)),
    )
    dict(parts)["vae"][BATCH_COUNT] = torch.tensor(1)
    with appearing_whole(target) as build:
        write_configs(
            build,
            architecture,
            is_distilled=is_distilled,
            bos_token_id=added[PAD_TOKEN],
            eos_token_id=added[END_TOKEN],
        )
        shutil.copytree(tokenizer, build / "tokenizer")
        for component, tensors in parts:
            _write_weights(build / component, tensors, max_shard_bytes)
    return target


def published_tensors(
    plan: WeightPlan, network: nn.Module, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A network's parameters and buffers, cut into the tensors that the plan fuses.

    Returns:
        Copies on the CPU, by published name.

    Raises:
        CheckpointConfigError: the network has other parameters than the plan.
    """
    values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    if values.keys() != plan.parts.keys():
        odd = sorted(values.keys() ^ plan.parts.keys())
        raise CheckpointConfigError(
            f"the network is not of this architecture: {', '.join(odd[:5])} stand on one side only"
        )
    tensors = {}
    for ours, sources in plan.parts.items():
        value = values[ours].detach()
        pieces = value.split([source.shape[0] for source in sources])  # along dimension 0
        for source, piece in zip(sources, pieces, strict=True):
            if piece.shape != source.shape:
                raise CheckpointConfigError(
                    f"{ours}: the architecture says {list(source.shape)} for {source.name}; "
                    f"the network has {list(piece.shape)}"
                )
            # A copy of its own: pieces that share memory are refused by safetensors.
            tensors[source.name] = piece.to("cpu", dtype, copy=True).contiguous()
    return tensors


def _write_weights(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    stem = STEMS[directory.name]
    shards = split_by_size(tensors.items(), lambda item: item[1].nbytes, max_shard_bytes)
    file_of: dict[str, str] = {}
    for name, shard in zip(shard_names(stem, len(shards)), shards, strict=True):
        save_file(dict(shard), directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)  # the library lets nobody but the owner read it
        file_of |= {key: name for key, _ in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_index(directory, stem, file_of, total)


def _check_tokenizer(directory: Path, vocab_size: int) -> dict[str, int]:
    """The ids of the added tokens, all of which the text encoder must have embeddings for."""
    added: dict[str, int] = json.loads((directory / "added_tokens.json").read_text("utf-8"))
    if max(added.values()) >= vocab_size:
        raise CheckpointConfigError(
            f"vocab_size must be at least {max(added.values()) + 1}, the size of the tokenizer in "
            f"{directory}; got {vocab_size}"
        )
    return added
