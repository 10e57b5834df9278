"""What the pipeline tells its callers: the model, a job as resolved, progress, the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from fluxcore.drawn import DrawnPicture
from fluxcore.params import GenerationParams, Schedule
from fluxcore.pipeline.denoise import DenoiseStep
from fluxcore.weights import LoadReport

Stage = Literal["text", "references", "trial", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model.

    Attributes:
        name: the directory's name, for display only.
        is_bundled: it is the one that ships with the package.
        is_distilled: few steps, no guidance.
        default_side_px: width and height of a picture of which neither is asked.
        parameters: loaded parameters per component.
        weight_bytes: bytes that all weights take on the device.
        load: one report per component.
    """

    name: str
    path: Path
    is_bundled: bool
    is_distilled: bool
    default_side_px: int
    default_steps: int
    default_guidance: float | None
    parameters: Mapping[str, int]
    weight_bytes: int
    load: tuple[LoadReport, ...]


@dataclass(frozen=True, slots=True)
class ResolvedParams:
    """A request with every default filled in.

    Attributes:
        guidance: None where guidance is off, be it by request or by the model.
        seeds: one for each picture.
        start_step: steps skipped at the start, by inpainting with strength below 1.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float | None
    seeds: tuple[int, ...]
    schedule: Schedule
    sigmas: tuple[float, ...]
    start_step: int


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A checked and resolved request; making one does no device work."""

    request: GenerationParams
    params: ResolvedParams
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Progress:
    """One slice of a job is done.

    Attributes:
        image_index: which of the n pictures, from 0.
        step, steps: Euler steps done and wanted, of this picture.
        denoise_step: the latents after a step, for previews; None in other stages.
        has_more: what comes next takes no work: the step of the next picture, which the same
            slice took, or the result.
    """

    stage: Stage
    image_index: int
    step: int
    steps: int
    denoise_step: DenoiseStep | None = None
    has_more: bool = False


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Finished pictures and how they came about.

    Attributes:
        timings: milliseconds per stage (text, references, trial, denoise, decode) and total,
            the device's work being waited for in each. "trial" is there where the first pictures
            of a size were used to find out whether to draw them side by side.
        peak_bytes: peak memory of the device, as ``Runtime.peak_bytes`` defines it, with
            whatever else ran meanwhile; on CUDA since the run that began last. What was queued
            before the run's first slice counts for the run before it.
        cache_hit: whether the prompt's conditioning was at hand.
    """

    pictures: list[DrawnPicture]
    seeds: list[int]
    timings: dict[str, float]
    warnings: list[str]
    params: ResolvedParams
    cache_hit: bool
    prompt_tokens: int
    peak_bytes: int

    @property
    def images(self) -> list[Image.Image]:
        """The pictures for PIL; each is made when it is first asked for."""
        return [picture.image for picture in self.pictures]
