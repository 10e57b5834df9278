"""The bodies of ``/v1/generate``: what is asked, what is answered.

Checks types and names only; ranges are checked once, by ``GenerationParams``.
Nothing is converted: a number written as text is refused.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from app.api.errors import from_problems
from app.api.input_pictures import InputPictures
from app.engine import JobOutcome, PictureFormat
from app.engine.packing import DEFAULT_QUALITY, Packing
from app.settings import Settings
from fluxcore.params import GenerationParams, Schedule

LOSSLESS: frozenset[PictureFormat] = frozenset({"png"})


class GenerateRequest(BaseModel):
    """What ``POST /v1/generate`` takes. Every field but the prompt may be left out or null."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(description="What to draw; at most 32000 characters.")
    negative_prompt: str | None = Field(
        None, description="What to steer away from; has an effect on base models only."
    )
    width: int | None = Field(
        None, description="Pixels; a multiple of 16 from 64 to 2048. Default: a setting."
    )
    height: int | None = Field(None, description="Pixels, as width.")
    steps: int | None = Field(None, description="1 to 200. Default: the model's.")
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="0 to 30; has an effect on base models only."
    )
    seed: int | None = Field(
        None, description="0 to 2**63 - 1; picture i uses seed + i. Default: random."
    )
    n: int | None = Field(None, description="Number of pictures, 1 to 10. Default: 1.")
    schedule: Schedule | None = Field(None, description="Default: flux, the reference's.")
    power_alpha: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="Exponent of the power schedule, above 0 to 10. Default: 2."
    )
    images: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="Up to 10 reference pictures: PNG, JPEG or WebP as base64 or data URL."
    )
    mask: str | None = Field(
        None,
        description="Inpainting on the first reference: transparent (or, without "
        "transparency, white) parts are drawn again.",
    )
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="Inpainting only: share of the schedule that is run, above 0 to 1."
    )
    output_format: PictureFormat | None = Field(
        None, description="Default: what Accept asks for, else png."
    )
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="Of jpeg and webp. Default: 90."
    )


Asked = TypeVar("Asked", bound=GenerateRequest)


class GeneratedPicture(BaseModel):
    """One picture of an answer. Units: pixels."""

    b64: str
    seed: int
    width: int
    height: int
    format: PictureFormat


class UsedParams(BaseModel):
    """What the pictures were drawn with, defaults filled in."""

    width: int
    height: int
    steps: int
    guidance: float | None
    schedule: Schedule
    power_alpha: float | None
    negative_prompt: str | None
    references: int
    strength: float | None
    n: int


class GenerateResponse(BaseModel):
    """What ``POST /v1/generate`` answers."""

    id: str
    created: int = Field(description="Unix time in seconds.")
    model: str
    images: list[GeneratedPicture]
    params: UsedParams
    timings: dict[str, float] = Field(description="Milliseconds per stage.")
    cache_hit: bool
    warnings: list[str]


def parse_generate(body: bytes, model: type[Asked]) -> Asked:
    """A request body, checked.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    _check_names(body, model.model_fields)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise from_problems(problems, model.model_fields) from None


def _check_names(body: bytes, known: Mapping[str, Any]) -> None:
    """Refuse the first unknown name; pydantic would make an error for each of a million.

    What is no JSON object is left to pydantic, which says so.
    """
    try:
        given = from_json(body)
    except ValueError:
        return
    if not isinstance(given, dict) or given.keys() <= known.keys():
        return
    name = next(name for name in given if name not in known)
    raise from_problems([{"type": "extra_forbidden", "loc": (name,)}], known)


def plain_params(asked: GenerateRequest, settings: Settings) -> GenerationParams:
    """All but the pictures, so that a wrong value is found before they are decoded.

    Raises:
        InvalidParamsError: naming the field.
    """
    given: dict[str, Any] = {
        name: value
        for name in (
            "negative_prompt",
            "width",
            "height",
            "steps",
            "guidance",
            "seed",
            "n",
            "schedule",
            "power_alpha",
        )
        if (value := getattr(asked, name)) is not None
    }
    if not asked.images:
        given.setdefault("width", settings.default_width)
        given.setdefault("height", settings.default_height)
    return GenerationParams(prompt=asked.prompt, **given)


def with_pictures(
    params: GenerationParams, asked: GenerateRequest, pictures: InputPictures
) -> GenerationParams:
    """The whole request.

    Raises:
        InvalidParamsError: naming the field.
    """
    strength = 1.0 if asked.strength is None else asked.strength
    return dataclasses.replace(
        params, references=pictures.references, mask=pictures.mask, strength=strength
    )


def packing_of(asked: GenerateRequest, picture_format: PictureFormat) -> Packing:
    """How the pictures are to be written."""
    quality = DEFAULT_QUALITY if asked.quality is None else asked.quality
    return Packing(picture_format, quality)


def all_warnings(
    outcome: JobOutcome, asked: GenerateRequest, picture_format: PictureFormat
) -> list[str]:
    """The model's warnings and those about the file format."""
    return [*outcome.warnings, *packing_warnings(asked, picture_format)]


def packing_warnings(asked: GenerateRequest, picture_format: PictureFormat) -> list[str]:
    """What was asked for and has no effect on the file."""
    if asked.quality is None or picture_format not in LOSSLESS:
        return []
    return [f"quality has no effect on {picture_format}, which is lossless"]


def response_json(
    outcome: JobOutcome,
    params: GenerationParams,
    warnings: list[str],
    request_id: str,
    created_s: int,
) -> bytes:
    """The answer's body. Slow for many large pictures: call it off the event loop."""
    resolved = outcome.resolved
    answer = GenerateResponse(
        id=request_id,
        created=created_s,
        model=outcome.model,
        images=[
            GeneratedPicture(
                b64=base64.b64encode(picture.data).decode("ascii"),
                seed=picture.seed,
                width=picture.width,
                height=picture.height,
                format=picture.format,
            )
            for picture in outcome.pictures
        ],
        params=UsedParams(
            width=resolved.width,
            height=resolved.height,
            steps=resolved.steps,
            guidance=resolved.guidance,
            schedule=params.schedule,
            power_alpha=params.power_alpha if params.schedule == "power" else None,
            negative_prompt=params.negative_prompt,
            references=len(params.references),
            strength=None if params.mask is None else params.strength,
            n=params.n,
        ),
        timings={f"{name}_ms": round(ms, 3) for name, ms in outcome.timings_ms.items()},
        cache_hit=outcome.cache_hit,
        warnings=warnings,
    )
    return answer.model_dump_json().encode()
