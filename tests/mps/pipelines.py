"""Pipelines under the rules of MPS, with and without weights, and runs of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.config import TEXT_TOKENS, read_checkpoint_config
from fluxcore.pipeline import Conditioning
from fluxcore.pipeline.encoded import EncodedJob
from fluxcore.pipeline.load import load_components
from fluxcore.runtime import Residency, Runtime
from fluxcore.runtime.dtypes import choose_dtypes
from fluxcore.weights import load, weight_plan
from fluxcore.weights.files import StoredTensor
from fluxcore.weights.random_architecture import (
    Architecture,
    model_index,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from fluxcore.weights.random_tokenizer import write_tokenizer
from tests.mps.audit import Audit, Ran
from tests.mps.pretend import DEVICE

CACHE_BYTES = 2**28

CHIPS = {"float16": "Apple M1 Pro", "bfloat16": "Apple M3"}
"""Chips for which ``auto`` chooses these dtypes."""


class Slice(NamedTuple):
    """What ran on the device between two yields of ``FluxPipeline.run``."""

    stage: str
    step: int
    ran: list[Ran]


class Drawn(NamedTuple):
    picture: Image.Image
    slices: list[Slice]


def pipeline_on(
    directory: Path,
    dtype: str,
    device: torch.device = DEVICE,
    residency: Residency = "resident",
) -> FluxPipeline:
    """A pipeline under the rules of MPS, wherever its tensors lie."""
    chip = CHIPS[dtype]
    dtypes = choose_dtypes("mps", "auto", chip)
    runtime = Runtime(device=device, kind="mps", dtypes=dtypes, chip=chip, residency=residency)
    return FluxPipeline(load_components(directory, runtime, None), runtime, CACHE_BYTES)


@dataclass(frozen=True, slots=True)
class UnreadTensor(StoredTensor):
    """A tensor of a file that nobody wrote."""

    def read_into(self, target: Tensor, first: int = 0) -> None:
        pass


def weightless_pipeline(
    directory: Path, architecture: Architecture, dtype: str, patch: pytest.MonkeyPatch
) -> FluxPipeline:
    """A base model of any size, loaded as ever, but from weights that do not exist."""
    tokens = write_tokenizer(directory / "tokenizer", None)
    text_encoder = text_encoder_config(
        architecture,
        dtype="bfloat16",
        bos_token_id=tokens.pad_token_id,
        eos_token_id=tokens.end_token_id,
    )
    for name, content in {
        "model_index.json": model_index(is_distilled=False),
        "scheduler/scheduler_config.json": scheduler_config(),
        "transformer/config.json": transformer_config(architecture),
        "text_encoder/config.json": text_encoder,
        "vae/config.json": vae_config(architecture),
    }.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")

    def stored(component: Path, stem: str) -> dict[str, StoredTensor]:
        config = getattr(read_checkpoint_config(component.parent), component.name)
        return {
            source.name: UnreadTensor(component / stem, 0, source.shape, torch.bfloat16)
            for sources in weight_plan(config).parts.values()
            for source in sources
        }

    patch.setattr(load, "stored_tensors", stored)
    return pipeline_on(directory, dtype)


def run_audited(
    pipe: FluxPipeline,
    params: GenerationParams,
    audit: Audit,
    after_slice: Callable[[], None] = lambda: None,
) -> Drawn:
    """Draw one picture; the audit's stages are those of ``Progress``."""
    work, slices = pipe.run(params), []
    while True:
        try:
            progress = next(work)
        except StopIteration as stop:
            return Drawn(stop.value.images[0], slices)
        slices.append(Slice(progress.stage, progress.step, audit.finish(progress.stage)))
        after_slice()


class Step(NamedTuple):
    """What ran on the device in one denoising step, and what came out."""

    latents: Tensor
    ran: list[Ran]


def denoise_audited(pipe: FluxPipeline, params: GenerationParams, audit: Audit) -> Iterator[Step]:
    """Denoise step by step, whatever the text: the encoder is left out."""
    job = pipe.prepare(params)
    shape = (1, TEXT_TOKENS, pipe.config.transformer.text_width)
    dtype = pipe.runtime.dtypes.residual or pipe.runtime.dtypes.weights
    values = torch.zeros(shape, dtype=dtype, device=DEVICE)
    text = Conditioning(values, token_count=20, truncated_tokens=0, cache_hit=False)
    negative = None if job.params.guidance is None else text
    encoded = EncodedJob(text, negative, pipe.encode_references(job))
    audit.finish("references")
    for step in pipe.denoise(job, 0, encoded):
        yield Step(step.latents, audit.finish("denoise"))


def everything(prompt: str = "a red fox", seed: int = 7, steps: int = 2) -> GenerationParams:
    """A request that goes through every stage: guided, painted in, with references."""
    return GenerationParams(
        prompt=prompt,
        negative_prompt="blurry",
        guidance=3.0,
        steps=steps,
        seed=seed,
        references=(noisy_picture(96, 80, 1), noisy_picture(64, 112, 2)),
        mask=disc_mask(96, 80),
    )


def noisy_picture(width: int, height: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def disc_mask(width: int, height: int) -> Image.Image:
    """White, where to draw, in the middle."""
    rows, columns = np.ogrid[:height, :width]
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (min(width, height) / 3) ** 2
    return Image.fromarray((inside * 255).astype(np.uint8))
