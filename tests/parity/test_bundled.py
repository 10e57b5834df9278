"""The bundled model is a true FLUX.2 [klein] directory: diffusers draws the same with it.

The worst relative error of any stage of any case was 2.3e-6, with random weights of this
architecture (torch 2.13.0, diffusers 0.42.1, transformers 5.23.0, x86-64).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.bundled import bundled_model
from tests.parity.twins import Twins, byte_differences, disc_mask, painting, worst_errors

TOLERANCE = 2e-5
"""The worst error of any stage was 1.04e-5 with one thread, and 3.0e-6 with two."""

PROMPT = "a large red circle in the center on a white background"


@pytest.fixture(scope="module")
def twins() -> Twins:
    return Twins.load(bundled_model(), "float32")


@pytest.mark.parametrize(
    "words",
    [
        {"width": 256, "height": 256},
        {"width": 192, "height": 128},
        {"references": (painting(160, 128, 1),), "prompt": "make it blue"},
        {
            "references": (painting(128, 128, 2), painting(96, 112, 3)),
            "prompt": "the shape of image 1 in the color of image 2",
        },
        {"references": (painting(128, 160, 4),), "mask": disc_mask(128, 160)},
    ],
    ids=["square", "wide", "edited", "two references", "inpainted"],
)
def test_every_stage_equals_the_reference(words: dict[str, Any], twins: Twins) -> None:
    params = GenerationParams(**{"prompt": PROMPT, "seed": 42, "steps": 4, **words})
    result, ours = twins.draw_ours(params)
    image, reference = twins.draw_reference(params)
    worst = worst_errors(ours, reference)
    bad = {name: error for name, error in worst.items() if error > TOLERANCE}
    assert not bad, bad
    assert byte_differences(result.images[0], image).max() <= 1


def test_default_arguments_of_both_draw_the_same_picture() -> None:
    theirs = Flux2KleinPipeline.from_pretrained(bundled_model(), local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.config.is_distilled
    drawn = theirs(
        prompt=PROMPT,
        height=256,
        width=256,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(42),
    ).images[0]
    ours = FluxPipeline.load(device="cpu", dtype="float32")
    result = ours.generate(GenerationParams(prompt=PROMPT, seed=42))
    difference = byte_differences(result.images[0], drawn)
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999
