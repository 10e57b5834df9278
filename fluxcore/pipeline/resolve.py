"""Filling in what a request leaves open, and saying what will have no effect."""

from __future__ import annotations

from fluxcore.errors import InvalidParamsError
from fluxcore.fitting import fitted_size
from fluxcore.params import MAX_SIDE_PX, SIZE_MULTIPLE, GenerationParams
from fluxcore.pipeline.result import ModelInfo, PreparedJob, ResolvedParams
from fluxcore.pipeline.schedule import sigmas

LARGEST_USEFUL_AREA = 1792 * 1792


def resolve(request: GenerationParams, info: ModelInfo, seed: int) -> PreparedJob:
    """A request in the light of the model.

    Args:
        seed: of the first picture; picture i gets seed + i.

    Raises:
        InvalidParamsError: naming the field.
    """
    warnings: list[str] = []
    width, height = _size(request, info.default_side_px)
    steps = request.steps or info.default_steps
    guidance = _guidance(request, info, warnings)
    if width * height > LARGEST_USEFUL_AREA:
        warnings.append(
            f"{width}x{height} is above 1792x1792, the largest size that the model draws well"
        )
    tokens = (width // SIZE_MULTIPLE) * (height // SIZE_MULTIPLE)
    params = ResolvedParams(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        seeds=tuple(seed + i for i in range(request.n)),
        schedule=request.schedule,
        sigmas=sigmas(request.schedule, steps, tokens, request.power_alpha),
        start_step=_start_step(request, steps),
    )
    return PreparedJob(request, params, warnings)


def _size(request: GenerationParams, default_side_px: int) -> tuple[int, int]:
    """(width, height) in pixels: as asked, else of the first reference, else the default."""
    width, height = default_side_px, default_side_px
    if request.references:
        width, height = fitted_size(request.references[0])
        if max(request.width or width, request.height or height) > MAX_SIDE_PX:
            remedy = "" if request.mask is not None else ", or give width and height"
            raise InvalidParamsError(
                "references[0]",
                f"references[0] fitted to the model gives {width}x{height}, and a side has at most "
                f"{MAX_SIDE_PX} pixels; crop it to at most 4:1{remedy}",
            )
    return request.width or width, request.height or height


def _guidance(request: GenerationParams, info: ModelInfo, warnings: list[str]) -> float | None:
    """The scale to guide with, or None for a single pass per step."""
    if info.is_distilled:
        for name, given in (
            ("guidance", request.guidance is not None and request.guidance > 1),
            ("negative_prompt", bool(request.negative_prompt)),
        ):
            if given:
                warnings.append(f"{name} has no effect on a distilled model")
        return None
    guidance = info.default_guidance if request.guidance is None else request.guidance
    if guidance is None or guidance <= 1:
        if request.negative_prompt:
            warnings.append("negative_prompt has no effect while guidance is at most 1")
        return None
    return guidance


def _start_step(request: GenerationParams, steps: int) -> int:
    """Steps that inpainting skips. Source: diffusers Flux2KleinInpaintPipeline.get_timesteps."""
    start = int(max(steps - min(steps * request.strength, steps), 0))
    if start >= steps:
        raise InvalidParamsError(
            "strength",
            f"strength {request.strength:g} of {steps} steps leaves none to run; raise one of them",
        )
    return start
