"""The fields of the OpenAI image requests: names, aliases and spellings.

Unknown fields are ignored, as clients send many; ranges are checked once, by
``GenerationParams``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from app.api.bodies import Form, Source, Whole
from app.api.documents import (
    PICTURE_SCHEMA,
    SIDE_SCHEMA,
    SIZE_OR_EMPTY_PATTERN,
    TEXT_SCHEMA,
    Schema,
)
from app.engine import PictureFormat
from app.errors import InvalidRequestError, MissingParameterError
from fluxcore.params import MAX_IMAGES, MAX_REFERENCES, MAX_SEED, MAX_STEPS

# Clients written for the older models read an address unless they ask for more.
URL_MODELS = "dall-e"
MAX_PARTIAL_IMAGES = 3
VARIATION_PROMPT = "A variation of this picture"

_FORMATS: dict[str, PictureFormat] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}
_TOLD_QUALITIES = ("low", "medium", "high")

_Steps = Annotated[Whole | None, Field(json_schema_extra={"minimum": 1, "maximum": MAX_STEPS})]
_Guidance = Annotated[
    float | None, Field(allow_inf_nan=False, json_schema_extra={"minimum": 0, "maximum": 30})
]
_Side = Annotated[Whole | None, Field(json_schema_extra=SIDE_SCHEMA)]
_Unused = Annotated[Any, Field(description="Accepted; has no effect.")]


class ImagesRequest(BaseModel):
    """What ``POST /v1/images/generations`` takes. All but the prompt may be left out or null."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())

    prompt: str = Field(json_schema_extra=TEXT_SCHEMA, description="What to draw.")
    model: str | None = Field(None, description="Any name; the loaded model serves it.")
    n: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 1, "maximum": MAX_IMAGES},
        description="Number of pictures. Default: 1.",
    )
    size: str | None = Field(
        None,
        json_schema_extra={"pattern": SIZE_OR_EMPTY_PATTERN},
        description="auto or WIDTHxHEIGHT, each side a multiple of 16 from 64 to 2048.",
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] | None = (
        Field(None, description="Accepted; num_inference_steps is what decides.")
    )
    response_format: Literal["url", "b64_json", "base64"] | None = Field(
        None, description="Default: url for model names that begin with dall-e, else b64_json."
    )
    output_format: Literal["png", "jpeg", "webp", "jpg"] | None = Field(
        None, description="Default: png."
    )
    output_compression: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 0, "maximum": 100},
        description="Quality of jpeg and webp. Default: 100.",
    )
    background: Annotated[
        Literal["auto", "opaque", "transparent"] | None,
        WithJsonSchema({"enum": ["auto", "opaque", None]}),
    ] = Field(None, description="The model draws opaque pictures only.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Whole | None = Field(
        None,
        json_schema_extra={"minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
        description="With stream: pictures of what is coming, at most. Default: 0.",
    )
    moderation: _Unused = None
    style: _Unused = None
    user: _Unused = None
    safety_identifier: _Unused = None
    input_fidelity: _Unused = None

    width: _Side = Field(None, description="Pixels; overrides size.")
    height: _Side = Field(None, description="Pixels; overrides size.")
    num_inference_steps: _Steps = Field(None, description="Default: the model's.")
    steps: _Steps = Field(None, description="The same as num_inference_steps.")
    step: _Steps = Field(None, description="The same as num_inference_steps.")
    guidance_scale: _Guidance = Field(None, description="Base models only.")
    guidance: _Guidance = Field(None, description="The same as guidance_scale.")
    cfg_scale: _Guidance = Field(None, description="The same as guidance_scale.")
    cfg: _Guidance = Field(None, description="The same as guidance_scale.")
    seed: Whole | None = Field(
        None,
        json_schema_extra={"minimum": -1, "maximum": MAX_SEED},
        description="Picture i uses seed + i. null or -1: random.",
    )
    negative_prompt: str | None = Field(
        None, json_schema_extra={"maxLength": 32_000}, description="Base models only."
    )

    @property
    def wants_url(self) -> bool:
        """Whether the pictures are to be fetched from addresses."""
        if self.response_format is None:
            return (self.model or "").startswith(URL_MODELS)
        return self.response_format == "url"

    @property
    def format(self) -> PictureFormat:
        """The files' format."""
        return _FORMATS[self.output_format or "png"]

    @property
    def told_quality(self) -> str | None:
        """The quality as the answer repeats it: only the names that the contract has for it."""
        return self.quality if self.quality in _TOLD_QUALITIES else None


def _optional(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _many(schema: Schema) -> Schema:
    return _optional({"type": "array", "items": schema, "minItems": 1, "maxItems": MAX_REFERENCES})


def _one_or_many(schema: Schema) -> Schema:
    return {"anyOf": [schema, *_many(schema)["anyOf"]]}


_URL_OBJECT: Schema = {
    "type": "object",
    "properties": {
        "image_url": {
            "anyOf": [
                PICTURE_SCHEMA,
                {"type": "object", "properties": {"url": PICTURE_SCHEMA}, "required": ["url"]},
            ]
        }
    },
    "required": ["image_url"],
}
_PICTURE: Schema = {"anyOf": [PICTURE_SCHEMA, _URL_OBJECT]}


class EditForm(ImagesRequest):
    """The text fields of an edit that is sent as a form."""

    @property
    def wants_url(self) -> bool:
        """Only where they are asked for: clients of edits read bytes, whatever the model."""
        return self.response_format == "url"


class EditRequest(EditForm):
    """What ``POST /v1/images/edits`` takes as JSON."""

    images: Annotated[Any, WithJsonSchema(_many(_PICTURE))] = Field(
        None, description="The pictures to work from, as data URLs."
    )
    image: Annotated[Any, WithJsonSchema(_one_or_many(_PICTURE))] = Field(
        None, description="The same as images."
    )
    mask: Annotated[Any, WithJsonSchema(_optional(_PICTURE))] = Field(
        None,
        description="Of the first picture's size; transparent (or, without transparency, white) "
        "parts are drawn again.",
    )

    def parted(self) -> tuple[EditRequest, Form]:
        """The request without its pictures, and these.

        Raises:
            InvalidRequestError: one of them holds no picture.
        """
        given = self.images or self.image or []
        pictures = given if isinstance(given, list) else [given]
        references: list[Source] = [
            _source(item, f"images[{i}]") for i, item in enumerate(pictures)
        ]
        mask = None if self.mask is None else _source(self.mask, "mask")
        rest = self.model_copy(update={"images": None, "image": None, "mask": None})
        return rest, Form(references=references, mask=mask)


class VariationForm(ImagesRequest):
    """The text fields of a variation: the prompt may be left out."""

    prompt: str = Field(
        VARIATION_PROMPT,
        json_schema_extra=TEXT_SCHEMA,
        description="What to draw; at most 32000 characters.",
    )

    @property
    def wants_url(self) -> bool:
        """As for generations, and without a model's name the older contract holds."""
        if self.response_format is None and self.model is None:
            return True
        return super().wants_url


def _source(item: Any, param: str) -> str:
    """A picture's data URL, base64 or address, from any of the places where clients put it."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        found = item.get("image_url")
        if isinstance(found, dict):
            found = found.get("url")
        if isinstance(found, str):
            return found
        if item.get("file_id") is not None:
            raise InvalidRequestError(
                f"{param}.file_id names a stored file, and none are stored here; "
                "send the picture as a data URL in image_url",
                param=f"{param}.file_id",
            )
        if found is None:
            raise MissingParameterError(
                f"{param}.image_url is required: a data URL", param=f"{param}.image_url"
            )
    raise InvalidRequestError(
        f"{param} must be a data URL, or an object that holds one in image_url", param=param
    )
