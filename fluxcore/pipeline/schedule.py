"""Noise levels of the Euler steps."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fluxcore.params import Schedule

# Schedules that are kept: each job asks twice, and most ask for one of a few sizes.
KEPT = 64


@lru_cache(KEPT)
def sigmas(
    schedule: Schedule, steps: int, image_tokens: int, power_alpha: float
) -> tuple[float, ...]:
    """Noise levels from 1 down to 0, rounded to float32.

    Shapes: steps + 1 values; step i goes from sigmas[i] to sigmas[i + 1].
    """
    if schedule == "flux":
        return _flux_sigmas(steps, image_tokens)
    alpha = 1.0 if schedule == "linear" else power_alpha
    return (*(float(np.float32(1.0 - (i / steps) ** alpha)) for i in range(steps)), 0.0)


def _flux_sigmas(steps: int, image_tokens: int) -> tuple[float, ...]:
    """Evenly spaced, then shifted towards noise by the size of the picture.

    Source: diffusers Flux2KleinPipeline.__call__ and FlowMatchEulerDiscreteScheduler
    (set_timesteps, _time_shift_exponential), whose float32 arithmetic this repeats.
    """
    even = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    shift = math.exp(empirical_mu(image_tokens, steps))
    shifted = shift / (shift + (1 / even - 1))
    return (*(float(sigma) for sigma in shifted.astype(np.float32)), 0.0)


def empirical_mu(image_tokens: int, steps: int) -> float:
    """How far the schedule is shifted; fitted by the model's authors.

    Source: black-forest-labs/flux2 src/flux2/sampling.py compute_empirical_mu.
    """
    mu_at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return mu_at_200
    mu_at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (mu_at_200 - mu_at_10) / 190.0
    return slope * steps + (mu_at_200 - 200.0 * slope)
