"""Write a checkpoint directory of random weights, in the published layout.

Owns the order of the files and the drawing of weights straight to disk. The weights
draw noise-like pictures; they are for trying a machine, measuring speed and comparing
implementations without a download.

Source: the directory layout of black-forest-labs/FLUX.2-klein-4B on Hugging Face;
huggingface/safetensors README ("Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fluxcore.errors import CheckpointConfigError
from fluxcore.weights.layout import (
    STEMS,
    appearing_whole,
    shard_names,
    split_by_size,
    write_index,
    write_json,
)
from fluxcore.weights.qwen_tokenizer import check_fits
from fluxcore.weights.random_architecture import (
    PRESETS,
    Architecture,
    model_index,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from fluxcore.weights.random_tensors import (
    TensorSpec,
    draw,
    text_encoder_tensors,
    transformer_tensors,
    vae_tensors,
)
from fluxcore.weights.random_tokenizer import write_tokenizer

__all__ = ["PRESETS", "Architecture", "write_random_checkpoint"]

DtypeName = Literal["bfloat16", "float16", "float32"]

DEFAULT_SHARD_BYTES = 2_000_000_000
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORMAT_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
}
HEADER_ALIGNMENT_BYTES = 8
PROGRESS_BYTES = 1 << 24
"""At least this much is written between two calls of ``progress``."""


def write_random_checkpoint(
    directory: str | os.PathLike[str],
    preset: str = "tiny",
    *,
    architecture: Architecture | None = None,
    seed: int = 0,
    is_distilled: bool = True,
    dtype: DtypeName = "bfloat16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_ranks: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a random checkpoint that ``diffusers.Flux2KleinPipeline`` loads as it is.

    Everything is written to a sibling directory that takes the final name at the
    end, so an interrupted run leaves no directory that looks complete. Weights go
    to disk as they are drawn, so memory stays the same at every size.

    Args:
        directory: where to; must not exist yet, or be empty.
        preset: a name in ``PRESETS``: ``tiny`` (5 MB), ``4b`` (16 GB), ``9b`` (35 GB).
        architecture: another architecture, instead of the preset's.
        seed: the same seed gives the same bytes, however they are sharded.
        is_distilled: what ``model_index.json`` says: a 4-step model, or a base model.
        dtype: of the weights on disk.
        max_shard_bytes: weights in one file at most; a larger tensor has a file of its own.
        tokenizer_ranks: Qwen's ``qwen.tiktoken``, to write the real tokenizer. Without
            it a small tokenizer of the same kind is written.
        progress: called with the bytes of weights written so far and in all.

    Returns:
        The directory.

    Raises:
        CheckpointError: the directory holds something already.
        CheckpointConfigError: no such preset or dtype, or the vocabulary is too small.
        CheckpointNotFoundError, CheckpointFileError: ``tokenizer_ranks`` cannot be used.
        OSError: the disk is full or not writable.
    """
    target = Path(directory)
    if architecture is None:
        architecture = _preset(preset)
    if dtype not in DTYPES:
        raise CheckpointConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if max_shard_bytes < 1:
        raise CheckpointConfigError(f"max_shard_bytes must be at least 1; got {max_shard_bytes}")
    with appearing_whole(target) as build:
        tokenizer = write_tokenizer(
            build / "tokenizer", None if tokenizer_ranks is None else Path(tokenizer_ranks)
        )
        check_fits(tokenizer, architecture.text_encoder.vocab_size)
        components = (
            _Component(
                "transformer",
                transformer_config(architecture),
                transformer_tensors(architecture),
            ),
            _Component(
                "text_encoder",
                text_encoder_config(
                    architecture,
                    dtype=dtype,
                    bos_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.end_token_id,
                ),
                text_encoder_tensors(architecture),
            ),
            _Component("vae", vae_config(architecture), vae_tensors(architecture)),
        )
        writer = _Writer(
            dtype=DTYPES[dtype],
            seed=seed,
            max_shard_bytes=max_shard_bytes,
            total_bytes=sum(
                spec.stored_bytes(DTYPES[dtype]) for part in components for spec in part.tensors
            ),
            progress=progress,
        )
        for component in components:
            writer.write_component(build, component)
        scheduler = build / "scheduler"
        scheduler.mkdir()
        write_json(scheduler / "scheduler_config.json", scheduler_config())
        # Last, because a directory without it is no checkpoint to any loader.
        write_json(build / "model_index.json", model_index(is_distilled=is_distilled))
    return target


@dataclass(frozen=True, slots=True)
class _Component:
    """One subdirectory with weights."""

    name: str
    config: dict[str, Any]
    tensors: list[TensorSpec]


@dataclass(slots=True)
class _Writer:
    """Streams tensors into safetensors files and counts what is written."""

    dtype: torch.dtype
    seed: int
    max_shard_bytes: int
    total_bytes: int
    progress: Callable[[int, int], None] | None
    done_bytes: int = field(default=0, init=False)
    reported_bytes: int = field(default=0, init=False)

    def write_component(self, parent: Path, component: _Component) -> None:
        directory = parent / component.name
        directory.mkdir()
        write_json(directory / "config.json", component.config)

        def size(spec: TensorSpec) -> int:
            return spec.stored_bytes(self.dtype)

        stem = STEMS[component.name]
        shards = split_by_size(component.tensors, size, self.max_shard_bytes)
        file_of: dict[str, str] = {}
        for name, shard in zip(shard_names(stem, len(shards)), shards, strict=True):
            self._write_file(directory / name, component, shard)
            file_of |= {spec.name: name for spec in shard}
        if len(shards) > 1:
            write_index(directory, stem, file_of, sum(map(size, component.tensors)))

    def _write_file(self, path: Path, component: _Component, specs: list[TensorSpec]) -> None:
        # Written here rather than by the library, which wants all tensors of a file in
        # memory at once. Tensors of wider elements first keeps every one aligned.
        ordered = sorted(specs, key=lambda s: -s.stored_dtype(self.dtype).itemsize)
        with path.open("wb") as stream:
            stream.write(self._header(ordered))
            for spec in ordered:
                for values in draw(spec, self.dtype, seed=self.seed, component=component.name):
                    stream.write(values.view(torch.uint8).numpy().data)
                    self._count(values.numel() * values.element_size())

    def _count(self, written_bytes: int) -> None:
        self.done_bytes += written_bytes
        due = self.done_bytes - self.reported_bytes >= PROGRESS_BYTES
        if self.progress is not None and (due or self.done_bytes == self.total_bytes):
            self.progress(self.done_bytes, self.total_bytes)
            self.reported_bytes = self.done_bytes

    def _header(self, specs: list[TensorSpec]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            end = offset + spec.stored_bytes(self.dtype)
            entries[spec.name] = {
                "dtype": FORMAT_NAMES[spec.stored_dtype(self.dtype)],
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        padded = math.ceil(len(text) / HEADER_ALIGNMENT_BYTES) * HEADER_ALIGNMENT_BYTES
        return padded.to_bytes(8, "little") + text.ljust(padded)


def _preset(name: str) -> Architecture:
    if name not in PRESETS:
        raise CheckpointConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
