"""Noise levels: the reference's bit for bit, and always falling from 1 to 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from hypothesis import given
from hypothesis import strategies as st

from fluxcore.params import MAX_STEPS
from fluxcore.pipeline.denoise import euler_step
from fluxcore.pipeline.schedule import empirical_mu, sigmas
from fluxcore.weights.random_architecture import scheduler_config

STEPS = st.integers(1, MAX_STEPS)
TOKENS = st.integers(16, 128 * 128)


def reference_scheduler(steps: int, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """As Flux2KleinPipeline.__call__ sets it up."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config())
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps)
    )
    return scheduler


def float32_bits(values: Sequence[float]) -> list[int]:
    """The bit patterns; the values must be float32 already."""
    narrow = np.array(values, dtype=np.float32)
    assert narrow.astype(float).tolist() == list(values)
    return narrow.view(np.int32).tolist()


def test_the_known_schedule_of_256_tokens_and_4_steps() -> None:
    found = sigmas("flux", 4, 256, power_alpha=2.0)
    assert [round(sigma, 4) for sigma in found] == [1.0, 0.9554, 0.8771, 0.7041, 0.0]


@given(steps=STEPS, tokens=TOKENS)
def test_flux_levels_equal_the_reference_bit_for_bit(steps: int, tokens: int) -> None:
    expected = reference_scheduler(steps, tokens).sigmas
    assert float32_bits(sigmas("flux", steps, tokens, 2.0)) == expected.view(torch.int32).tolist()


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4299, 4300, 4301, 12_544, 16_384])
@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
def test_mu_equals_the_reference(tokens: int, steps: int) -> None:
    assert empirical_mu(tokens, steps) == compute_empirical_mu(tokens, steps)


@given(steps=STEPS, tokens=TOKENS, schedule=st.sampled_from(["flux", "linear"]))
def test_levels_fall_strictly_from_1_to_0(steps: int, tokens: int, schedule: str) -> None:
    found = sigmas(schedule, steps, tokens, 2.0)  # type: ignore[arg-type]
    assert len(found) == steps + 1
    assert found[0] == 1.0
    assert found[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(found))


@given(steps=STEPS, alpha=st.floats(0.1, 3.0))
def test_power_levels_fall_strictly_from_1_to_0(steps: int, alpha: float) -> None:
    found = sigmas("power", steps, 256, alpha)
    assert len(found) == steps + 1
    assert (found[0], found[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in itertools.pairwise(found))


@given(steps=STEPS, alpha=st.floats(0.0, 10.0, exclude_min=True))
def test_power_levels_never_rise_whatever_the_exponent(steps: int, alpha: float) -> None:
    """Far from 1 and at many steps, neighbours may round to one float32."""
    found = sigmas("power", steps, 256, alpha)
    assert (found[0], found[-1]) == (1.0, 0.0)
    assert all(a >= b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("schedule", "alpha", "expected"),
    [
        ("linear", 2.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.3, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("power", 1.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("power", 2.0, [1.0, 0.9375, 0.75, 0.4375, 0.0]),
        ("power", 0.5, [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
    ],
)
def test_linear_and_power_are_what_their_names_say(
    schedule: str, alpha: float, expected: list[float]
) -> None:
    found = sigmas(schedule, 4, 256, alpha)  # type: ignore[arg-type]
    assert float32_bits(found) == float32_bits([float(np.float32(sigma)) for sigma in expected])


@pytest.mark.parametrize("schedule", ["linear", "power"])
def test_only_flux_depends_on_the_size(schedule: str) -> None:
    assert sigmas(schedule, 9, 16, 2.0) == sigmas(schedule, 9, 9999, 2.0)  # type: ignore[arg-type]
    assert sigmas("flux", 9, 16, 2.0) != sigmas("flux", 9, 9999, 2.0)
    assert sigmas("flux", 9, 16, 2.0) == sigmas("flux", 9, 16, 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_equals_the_reference_bit_for_bit(dtype: torch.dtype) -> None:
    scheduler = reference_scheduler(4, 256)
    levels = sigmas("flux", 4, 256, 2.0)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 64, 128, generator=generator).to(dtype)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(1, 64, 128, generator=generator).to(dtype)
        expected = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        latents = euler_step(latents, velocity, levels[i], levels[i + 1])
        assert latents.dtype == dtype
        assert torch.equal(latents, expected)
