"""The Euler loop from noise to latents, one step at a time, of one picture or of several alike.

Source: diffusers Flux2KleinPipeline.__call__, Flux2KleinInpaintPipeline.__call__ and
FlowMatchEulerDiscreteScheduler.step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fluxcore.models import Flux2Transformer, Modulation
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

    Shapes: noise [1, h w, C]; modulations, one of each step to run; references [1, L_ref, C];
    positive, negative [1, 512, 3 D]; pe for [txt, img, references].
    """

    noise: Tensor
    modulations: Sequence[Modulation]
    references: Tensor | None
    positive: Tensor
    negative: Tensor | None
    guidance: float
    pe: Rope
    inpainting: Inpainting | None


class Velocity(NamedTuple):
    """What the transformer is called with for one prompt of one picture's step.

    Shapes: img [1, L_img, C], references last; txt [1, 512, D].
    """

    img: Tensor
    txt: Tensor
    modulation: Modulation
    pe: Rope
    tokens: int


VelocitiesOf = Callable[[Sequence[Velocity]], Sequence[Tensor]]
"""Answers calls that differ in img and txt alone, in their order. Shapes: each [1, tokens, C]."""


class Denoising:
    """One picture on its way from noise to latents.

    Args:
        sigmas: noise levels, one more than steps; the last is 0.
        start_step: index of the first step to run.

    Attributes:
        passes: calls of the transformer in each step.
    """

    def __init__(
        self,
        transformer: Flux2Transformer,
        inputs: DenoiseInputs,
        sigmas: Sequence[float],
        start_step: int,
    ) -> None:
        self._inputs = inputs
        self._sigmas = tuple(sigmas)
        self._first = self._done = start_step
        assert len(inputs.modulations) == len(sigmas) - 1 - start_step, "one for each step to run"
        prompts = (inputs.positive, inputs.negative)
        self._txts = [transformer.text_tokens(prompt) for prompt in prompts if prompt is not None]
        self.passes = len(self._txts)
        self._latents = inputs.noise
        if inputs.inpainting is not None:
            self._latents = inputs.inpainting.noised(sigmas[start_step])

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self._done == len(self._sigmas) - 1

    @property
    def alike(self) -> Hashable:
        """Equal for pictures whose next steps may be done as one."""
        references = self._inputs.references
        # Tables of one size are one object while they are kept, and the pictures keep them.
        pe = tuple(map(id, self._inputs.pe))
        held = None if references is None else references.shape
        return (self._latents.shape, held, pe, self._sigmas, self._done, self.passes)

    def calls(self) -> list[Velocity]:
        """What the next step asks of the transformer: with the prompt, then against it."""
        before, references = self._latents, self._inputs.references
        # order: [img, references]; the text is put before them inside the transformer
        img = before if references is None else torch.cat((before, references), dim=1)
        # One layout in every step, so that one compiled or recorded form serves all of them.
        img = img.contiguous()
        modulation = self._inputs.modulations[self._done - self._first]
        pe = self._inputs.pe
        return [Velocity(img, txt, modulation, pe, before.shape[1]) for txt in self._txts]

    def advance(self, velocities: Sequence[Tensor]) -> DenoiseStep:
        """Take the step, given the transformer's answers."""
        inputs, before = self._inputs, self._latents
        level, next_level = self._sigmas[self._done : self._done + 2]
        velocity = velocities[0]
        if self.passes > 1:
            velocity = velocities[1] + inputs.guidance * (velocity - velocities[1])
        latents = euler_step(before, velocity, level, next_level)
        if inputs.inpainting is not None:
            latents = inputs.inpainting.keep(latents, next_level)
        self._latents = latents
        self._done += 1
        total = len(self._sigmas) - 1
        return DenoiseStep(self._done, total, next_level, latents, level, before, velocity)


def step_together(pictures: Sequence[Denoising], velocities_of: VelocitiesOf) -> list[DenoiseStep]:
    """One step of each of several pictures that are alike; of one, the plain case."""
    assert len({picture.alike for picture in pictures}) == 1, "steps that differ"
    answers = iter(velocities_of([call for picture in pictures for call in picture.calls()]))
    return [picture.advance(list(islice(answers, picture.passes))) for picture in pictures]


def denoise(
    transformer: Flux2Transformer,
    inputs: DenoiseInputs,
    sigmas: Sequence[float],
    start_step: int,
    velocities_of: VelocitiesOf | None = None,
) -> Iterator[DenoiseStep]:
    """Yield after every Euler step; closing the generator abandons the picture.

    Args:
        sigmas, start_step: as ``Denoising`` takes them.
        velocities_of: how the transformer is called; one call after the other when left out.
    """
    picture = Denoising(transformer, inputs, sigmas, start_step)
    of = velocities_of or (lambda calls: [transformer(*call) for call in calls])
    while not picture.is_over:
        yield step_together((picture,), of)[0]


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One step along the velocity, in float32, rounded to the velocity's dtype."""
    difference = torch.tensor(sigma_next) - torch.tensor(sigma)  # float32, on the host
    return (latents.float() + difference * velocity).to(velocity.dtype)
