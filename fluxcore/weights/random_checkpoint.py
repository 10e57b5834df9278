"""Write a checkpoint directory of random weights, in the published layout.

Owns the files and their order: what it leaves behind is either a whole checkpoint
or nothing that passes for one. The weights draw noise-like pictures; they are for
trying a machine, measuring speed and comparing implementations without a download.

Source: the directory layout of black-forest-labs/FLUX.2-klein-4B on Hugging Face;
huggingface/safetensors README ("Format").
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fluxcore.errors import CheckpointConfigError, CheckpointError
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
from fluxcore.weights.random_tokenizer import check_fits, write_tokenizer

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
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
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
    _check_free(target)
    with _appearing_whole(target) as build:
        tokenizer = write_tokenizer(
            build / "tokenizer", None if tokenizer_ranks is None else Path(tokenizer_ranks)
        )
        check_fits(tokenizer, architecture.text_encoder.vocab_size)
        components = (
            _Component(
                "transformer",
                DIFFUSERS_STEM,
                transformer_config(architecture),
                transformer_tensors(architecture),
            ),
            _Component(
                "text_encoder",
                TRANSFORMERS_STEM,
                text_encoder_config(
                    architecture,
                    dtype=dtype,
                    bos_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.end_token_id,
                ),
                text_encoder_tensors(architecture),
            ),
            _Component("vae", DIFFUSERS_STEM, vae_config(architecture), vae_tensors(architecture)),
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
        _write_json(scheduler / "scheduler_config.json", scheduler_config())
        # Last, because a directory without it is no checkpoint to any loader.
        _write_json(build / "model_index.json", model_index(is_distilled=is_distilled))
    return target


@dataclass(frozen=True, slots=True)
class _Component:
    """One subdirectory with weights."""

    name: str
    stem: str
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
        _write_json(directory / "config.json", component.config)
        shards = self._split(component.tensors)
        if len(shards) == 1:
            self._write_file(directory / f"{component.stem}.safetensors", component, shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"{component.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_file(directory / name, component, shard)
            weight_map |= {spec.name: name for spec in shard}
        total = sum(spec.stored_bytes(self.dtype) for spec in component.tensors)
        _write_json(
            directory / f"{component.stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )

    def _split(self, specs: list[TensorSpec]) -> list[list[TensorSpec]]:
        shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in specs:
            size = spec.stored_bytes(self.dtype)
            if shards[-1] and filled + size > self.max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(spec)
            filled += size
        return shards

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


def _check_free(target: Path) -> None:
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(
                f"{target} is not empty and is never overwritten; remove it or name another"
            )
    elif os.path.lexists(target):
        raise CheckpointError(f"{target} is not a directory; remove it or name another")


@contextmanager
def _appearing_whole(target: Path) -> Iterator[Path]:
    """A sibling directory that becomes ``target`` if all goes well, and vanishes if not."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    build = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    build.mkdir()
    try:
        yield build
        _check_free(target)
        if target.is_dir():
            target.rmdir()
        build.rename(target)
    finally:
        shutil.rmtree(build, ignore_errors=True)  # gone already, if all went well


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
