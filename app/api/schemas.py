"""The bodies of ``/v1/generate``: what is asked, what is answered.

Checks types and names only; ranges are checked once, by ``GenerationParams``.
Nothing is converted in JSON: a number written as text is refused.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import from_json

from app.api.bodies import (
    SMALL_BODY_BYTES,
    Form,
    Whole,
    is_form,
    parse_fields,
    read_body,
    read_form,
)
from app.api.documents import (
    FILE_SCHEMA,
    FILES_SCHEMA,
    PICTURE_SCHEMA,
    RATIO_PATTERN,
    SIDE_SCHEMA,
    SIZE_PATTERN,
    TEXT_SCHEMA,
    Schema,
    form_schema,
    json_or_form_body,
    with_maximum,
)
from app.api.errors import from_problems
from app.api.input_pictures import InputPictures
from app.api.sides import MAX_MEGAPIXELS, sides_of
from app.engine import JobOptions, JobOutcome, PictureFormat, Priority
from app.engine.packing import DEFAULT_QUALITY, Packing
from app.errors import InvalidRequestError
from app.settings import Settings
from fluxcore.params import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_POWER_ALPHA,
    MAX_PROMPT_CHARS,
    MAX_REFERENCES,
    MAX_SEED,
    MAX_STEPS,
    GenerationParams,
    Schedule,
)

MAX_PREVIEWS = 10
LOSSLESS: frozenset[PictureFormat] = frozenset({"png"})


# In JSON always text. A form's pictures are put in as the bytes that they came as.
_Picture = Annotated[str, WithJsonSchema(PICTURE_SCHEMA)]


class GenerateRequest(BaseModel):
    """What ``POST /v1/generate`` takes. Every field but the prompt may be left out or null."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(
        json_schema_extra=TEXT_SCHEMA,
        description="What to draw. Of more than 512 tokens the rest is cut; warnings says so.",
    )
    negative_prompt: str | None = Field(
        None,
        json_schema_extra={"maxLength": MAX_PROMPT_CHARS},
        description="What to steer away from; has an effect on base models only.",
    )
    width: Whole | None = Field(
        None,
        json_schema_extra=SIDE_SCHEMA,
        description="Pixels. Default: the first reference's (1024x1024 at most in area), else "
        "a setting, else the model's own.",
    )
    height: Whole | None = Field(
        None, json_schema_extra=SIDE_SCHEMA, description="Pixels, as width."
    )
    size: str | None = Field(
        None,
        json_schema_extra={"pattern": SIZE_PATTERN},
        description="Instead of width and height: WIDTHxHEIGHT, or auto for the default.",
    )
    aspect_ratio: str | None = Field(
        None,
        json_schema_extra={"pattern": RATIO_PATTERN},
        description="Instead of width and height: WIDTH:HEIGHT, such as 16:9.",
    )
    megapixels: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_MEGAPIXELS},
        description="With aspect_ratio: the area in millions of pixels. Default: the default "
        "size's. Sides are rounded to multiples of 16.",
    )
    steps: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 1, "maximum": MAX_STEPS},
        description="Default: the model's; 4 on distilled models, 50 on base models.",
    )
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        json_schema_extra={"minimum": 0, "maximum": MAX_GUIDANCE},
        description="Has an effect on base models only. Default there: 4.",
    )
    seed: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 0, "maximum": MAX_SEED},
        description="Picture i uses seed + i. Default: random, and told.",
    )
    n: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 1, "maximum": MAX_IMAGES},
        description="Number of pictures. Default: 1.",
    )
    schedule: Schedule | None = Field(None, description="Default: flux, the reference's.")
    power_alpha: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0, "maximum": MAX_POWER_ALPHA},
        description="Exponent of the power schedule. Default: 2.",
    )
    images: Annotated[list[_Picture], Field(fail_fast=True)] | None = Field(
        None,
        json_schema_extra={"maxItems": MAX_REFERENCES},
        description="Reference pictures: PNG, JPEG or WebP.",
    )
    mask: _Picture | None = Field(
        None,
        description="Inpainting on the first reference: transparent (or, without "
        "transparency, white) parts are drawn again. Of the same size.",
    )
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
        description="With a mask only: share of the schedule that is run. Default: 1.",
    )
    output_format: PictureFormat | None = Field(
        None, description="Default: what Accept asks for, else png."
    )
    quality: Annotated[Whole, Field(ge=1, le=100)] | None = Field(
        None,
        json_schema_extra={"minimum": 1, "maximum": 100},
        description="Of jpeg and webp. Default: 90.",
    )
    stream: bool | None = Field(
        None, description="Answer with server-sent events, whatever Accept says."
    )
    previews: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 0, "maximum": MAX_PREVIEWS},
        description="With stream, and of jobs: pictures of what is coming, per image at most. "
        "Default: 0.",
    )
    priority: Literal["interactive", "normal", "batch"] | None = Field(
        None, description="Who goes first when jobs wait. Default: normal."
    )
    timeout_s: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0},
        description="Seconds after which the job is cancelled, if it is not done. "
        "For /v1/generate, the default and the most is the setting request_timeout_s.",
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


async def read_generate(request: Request, settings: Settings, model: type[Asked]) -> Asked:
    """The request, from JSON or from a form with files.

    Raises:
        MediaTypeError: the body is neither.
        InvalidRequestError: naming the first field that is wrong.
    """
    if is_form(request):
        return from_form(await read_form(request, settings.max_body_bytes), model)
    body = await read_body(request)
    if len(body) <= SMALL_BODY_BYTES:
        return parse_generate(body, model)
    return await anyio.to_thread.run_sync(parse_generate, body, model)


def generate_body(model: type[GenerateRequest], longest_s: float) -> Schema:
    """The body for the OpenAPI document: JSON or a form.

    Args:
        longest_s: the most that ``timeout_s`` may be.
    """
    files = {"image": FILES_SCHEMA, "mask": FILE_SCHEMA}
    form = form_schema(model, files, required=("prompt",), without=("images",))
    return with_maximum(json_or_form_body(model, form), "timeout_s", longest_s)


def from_form(form: Form, model: type[Asked]) -> Asked:
    """A form as a request; its files stand in ``images`` and ``mask`` as bytes.

    Raises:
        InvalidRequestError: naming the first field that is wrong.
    """
    known = [name for name in model.model_fields if name != "images"]
    for name in (*form.unknown_files, *form.fields):
        if name not in known:
            raise from_problems([{"type": "extra_forbidden", "loc": (name,)}], ["image", *known])
    asked = parse_fields(form, model)
    return asked.model_copy(update={"images": form.references or None, "mask": form.mask})


def plain_params(
    asked: GenerateRequest, settings: Settings, own_side_px: Callable[[], int]
) -> GenerationParams:
    """All but the pictures, so that a wrong value is found before they are decoded.

    Args:
        own_side_px: tells the loaded model's default width and height.

    Raises:
        InvalidRequestError, InvalidParamsError: naming the field.
        ServiceError: what is asked depends on a model that is not loaded.
    """
    given: dict[str, Any] = {
        name: value
        for name in (
            "negative_prompt",
            "steps",
            "guidance",
            "seed",
            "n",
            "schedule",
            "power_alpha",
        )
        if (value := getattr(asked, name)) is not None
    }
    given |= sides_of(asked, settings, own_side_px)
    if not asked.images:
        given = {"width": settings.default_width, "height": settings.default_height, **given}
    return GenerationParams(prompt=asked.prompt, **given)


def options_of(asked: GenerateRequest, longest_s: float) -> JobOptions:
    """How the job is to be treated.

    Args:
        longest_s: the most that ``timeout_s`` may be.

    Raises:
        InvalidRequestError: naming the field.
    """
    previews = asked.previews or 0
    if not 0 <= previews <= MAX_PREVIEWS:
        raise InvalidRequestError(
            f"previews must be from 0 to {MAX_PREVIEWS}; got {previews}", param="previews"
        )
    if asked.timeout_s is not None and not 0 < asked.timeout_s <= longest_s:
        raise InvalidRequestError(
            f"timeout_s must be above 0 to {longest_s:g}; got {asked.timeout_s:g}",
            param="timeout_s",
        )
    return JobOptions(
        previews=previews,
        priority=Priority(asked.priority or Priority.NORMAL),
        deadline_s=asked.timeout_s,
    )


def with_pictures(
    params: GenerationParams, asked: GenerateRequest, pictures: InputPictures
) -> GenerationParams:
    """The whole request.

    Raises:
        InvalidRequestError, InvalidParamsError: naming the field.
    """
    strength = 1.0 if asked.strength is None else asked.strength
    sized_by = next((name for name in ("size", "aspect_ratio") if getattr(asked, name)), None)
    if pictures.mask is not None and sized_by is not None and params.width is not None:
        raise InvalidRequestError(
            f"{sized_by} does not go with a mask: the picture keeps the size of the first image",
            param=sized_by,
        )
    if not pictures.references and pictures.mask is None and strength == params.strength:
        return params
    return dataclasses.replace(
        params, references=pictures.references, mask=pictures.mask, strength=strength
    )


def without_pictures(asked: GenerateRequest) -> GenerateRequest:
    """The request once its pictures are decoded: what came need not be held any longer."""
    if asked.images is None and asked.mask is None:
        return asked
    return asked.model_copy(update={"images": None, "mask": None})


def packing_of(asked: GenerateRequest, picture_format: PictureFormat) -> Packing:
    """How the pictures are to be written."""
    quality = DEFAULT_QUALITY if asked.quality is None else asked.quality
    return Packing(picture_format, quality)


def all_warnings(
    outcome: JobOutcome, asked: GenerateRequest, picture_format: PictureFormat
) -> list[str]:
    """The model's warnings and those about fields that had no effect."""
    warnings = [*outcome.warnings, *packing_warnings(asked, picture_format)]
    if asked.previews and not asked.stream:
        warnings.append("previews has no effect without stream")
    return warnings


def packing_warnings(asked: GenerateRequest, picture_format: PictureFormat) -> list[str]:
    """What was asked for and has no effect on the file."""
    if asked.quality is None or picture_format not in LOSSLESS:
        return []
    return [f"quality has no effect on {picture_format}, which is lossless"]


def response_of(
    outcome: JobOutcome,
    params: GenerationParams,
    warnings: list[str],
    request_id: str,
    created_s: int,
) -> GenerateResponse:
    """The answer. Slow for many large pictures, as is writing it: call it off the event loop."""
    resolved = outcome.resolved
    # Made of what is known to be right; to check it again takes longer than to write it.
    return GenerateResponse.model_construct(
        id=request_id,
        created=created_s,
        model=outcome.model,
        images=[
            GeneratedPicture.model_construct(
                b64=base64.b64encode(picture.data).decode("ascii"),
                seed=picture.seed,
                width=picture.width,
                height=picture.height,
                format=picture.format,
            )
            for picture in outcome.pictures
        ],
        params=UsedParams.model_construct(
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
