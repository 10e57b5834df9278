"""fluxcore in bf16 lies as close to diffusers in bf16 as that lies to diffusers in float32.

All three round differently on the way, so no pair can be closer than the rounding is
large; a fault would show as a distance of its own. Measured (torch 2.13.0, diffusers
0.42.1): the comment beside the factors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxcore import GenerationParams
from tests.parity.conftest import ARCHITECTURES, TwinsOf
from tests.parity.twins import byte_differences, painting, relative_error

PARAMS = GenerationParams(prompt="a lighthouse in a storm", width=160, height=128, steps=4, seed=7)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("references", [0, 2])
def test_bfloat16_is_within_the_reference_s_own_rounding(
    name: str, references: int, twins_of: TwinsOf
) -> None:
    params = PARAMS
    if references:
        pictures = tuple(painting(90, 120, seed) for seed in range(references))
        params = GenerationParams(**PARAMS.summary() | {"references": pictures})
    half, full = twins_of(name, dtype="bfloat16"), twins_of(name)
    result, ours = half.draw_ours(params)
    image, theirs = half.draw_reference(params)
    exact_image, exact = full.draw_reference(params)

    # measured: 1.28 for txt_in, 0.88 for the latents, 1.07 for the bytes
    for stage, factor in (("txt_in", 1.5), ("latents", 1.2)):
        distance = relative_error(ours[stage][-1], theirs[stage][-1])
        rounding = relative_error(theirs[stage][-1], exact[stage][-1])
        assert 0 < rounding < 0.1
        assert distance <= factor * rounding
    apart = byte_differences(result.images[0], image).mean()
    rounding_bytes = byte_differences(image, exact_image).mean()
    assert apart <= 1.5 * rounding_bytes


def test_timesteps_are_rounded_as_diffusers_rounds_them(twins_of: TwinsOf) -> None:
    """In bf16, 955.39 becomes 956 on the way into the transformer."""
    twins = twins_of("tiny", dtype="bfloat16")
    sigmas = torch.tensor([1.0, 0.95539, 0.87713, 0.70412])
    theirs = twins.reference.transformer
    timestep = (sigmas * 1000).to(torch.bfloat16) / 1000
    vec = theirs.time_guidance_embed(timestep.to(torch.bfloat16) * 1000, None)
    for i, mod in enumerate(twins.ours.transformer.modulation(sigmas)):
        for mine, module, scales in (
            (mod.img, theirs.double_stream_modulation_img, (1, 4)),
            (mod.txt, theirs.double_stream_modulation_txt, (1, 4)),
            (mod.single, theirs.single_stream_modulation, (1,)),
        ):
            rows = module(vec[i : i + 1])[0].detach().unflatten(-1, (len(mine), -1)).clone()
            rows[list(scales)] += 1
            assert relative_error(mine.flatten(), rows.flatten()) < 0.01
    rounded = (sigmas * 1000).to(torch.bfloat16).float()
    assert np.array_equal(rounded.numpy(), [1000, 956, 876, 704])
