"""The Euler loop from noise to latents, one step at a time.

Source: diffusers Flux2KleinPipeline.__call__, Flux2KleinInpaintPipeline.__call__ and
FlowMatchEulerDiscreteScheduler.step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxcore.models import Flux2Transformer
from fluxcore.models.rope import Rope


@dataclass(frozen=True, slots=True)
class DenoiseStep:
    """The state after one Euler step.

    Attributes:
        index: steps done, from 1.
        total: steps wanted.
        sigma: noise level that the latents now have.
        latents: [1, h w, C].
        sigma_before, latents_before, velocity: the step's input and the model's answer.
    """

    index: int
    total: int
    sigma: float
    latents: Tensor
    sigma_before: float
    latents_before: Tensor
    velocity: Tensor

    def predicted_clean(self) -> Tensor:
        """The clean latents that the model sees coming: x - sigma * v. Shapes: [1, h w, C]."""
        return self.latents_before - self.sigma_before * self.velocity


@dataclass(frozen=True, slots=True)
class Inpainting:
    """What stays of a given picture.

    Shapes: picture and noise [1, h w, C], mask [1, h w, 1], 1 where to draw.
    """

    picture: Tensor
    noise: Tensor
    mask: Tensor

    def noised(self, sigma: float) -> Tensor:
        """The picture at a noise level, rounded as the reference rounds it."""
        level = torch.tensor(sigma).to(self.picture.dtype)
        return level * self.noise + (1.0 - level) * self.picture

    def keep(self, latents: Tensor, sigma: float) -> Tensor:
        """Put the unmasked part back, at the noise level that the latents have."""
        kept = self.picture if sigma == 0.0 else self.noised(sigma)
        return (1 - self.mask) * kept + self.mask * latents


@dataclass(frozen=True, slots=True)
class DenoiseInputs:
    """Everything that one picture's loop needs, on the device.

    Shapes: noise [1, h w, C]; references [1, L_ref, C]; positive, negative
    [1, 512, 3 D]; pe for [txt, img, references].
    """

    noise: Tensor
    references: Tensor | None
    positive: Tensor
    negative: Tensor | None
    guidance: float
    pe: Rope
    inpainting: Inpainting | None


def denoise(
    transformer: Flux2Transformer,
    inputs: DenoiseInputs,
    sigmas: Sequence[float],
    start_step: int,
    velocity_of: Callable[..., Tensor] | None = None,
) -> Iterator[DenoiseStep]:
    """Yield after every Euler step; closing the generator abandons the picture.

    Args:
        sigmas: noise levels, one more than steps; the last is 0.
        start_step: index of the first step to run.
        velocity_of: how the transformer is called; the network itself when left out.
    """
    velocity_of = velocity_of or transformer
    total = len(sigmas) - 1
    levels = torch.tensor(sigmas[start_step:-1], dtype=torch.float32)
    modulations = transformer.modulation(levels.to(inputs.noise.device))
    positive = transformer.text_tokens(inputs.positive)
    negative = None if inputs.negative is None else transformer.text_tokens(inputs.negative)
    inpainting = inputs.inpainting
    latents = inputs.noise
    if inpainting is not None:
        latents = inpainting.noised(sigmas[start_step])
    for i, modulation in enumerate(modulations, start=start_step):
        before = latents
        tokens = before.shape[1]
        # order: [img, references]; the text is put before them inside the transformer
        img = before if inputs.references is None else torch.cat((before, inputs.references), dim=1)
        # One layout in every step, so that one compiled or recorded form serves all of them.
        img = img.contiguous()
        velocity = velocity_of(img, positive, modulation, inputs.pe, tokens)
        if negative is not None:
            unguided = velocity_of(img, negative, modulation, inputs.pe, tokens)
            velocity = unguided + inputs.guidance * (velocity - unguided)
        latents = euler_step(before, velocity, sigmas[i], sigmas[i + 1])
        if inpainting is not None:
            latents = inpainting.keep(latents, sigmas[i + 1])
        yield DenoiseStep(i + 1, total, sigmas[i + 1], latents, sigmas[i], before, velocity)


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One step along the velocity, in float32, rounded to the velocity's dtype."""
    difference = torch.tensor(sigma_next) - torch.tensor(sigma)  # float32, on the host
    return (latents.float() + difference * velocity).to(velocity.dtype)
