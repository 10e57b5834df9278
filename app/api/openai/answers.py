"""Answers of the OpenAI image routes.

No field is null: what does not apply is left out. ``seed``, ``timings``, ``warnings`` and
the like are additions, which the official clients show as attributes.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from pydantic import BaseModel, Field

from app.api.openai.fields import ImagesRequest
from app.engine import JobOutcome, PackedPicture, PictureFormat
from app.engine.contract import Resolved
from fluxcore.fitting import fitted_size
from fluxcore.params import SIZE_MULTIPLE, GenerationParams


class ImageItem(BaseModel):
    """One picture: ``b64_json`` or ``url``, never both."""

    b64_json: str | None = Field(None, json_schema_extra={"type": "string"})
    url: str | None = None
    seed: int


class TokenDetails(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """What the model saw and drew, in its own tokens: 16x16 pixels are one."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    output_tokens_details: TokenDetails


class ImagesAnswer(BaseModel):
    """What the image routes answer."""

    id: str
    created: int = Field(description="Unix time in seconds.")
    model: str
    data: list[ImageItem]
    background: str
    output_format: PictureFormat
    quality: str | None = None
    size: str
    usage: Usage
    timings: dict[str, float] = Field(description="Milliseconds per stage.")
    cache_hit: bool
    warnings: list[str]


def usage_of(outcome: JobOutcome, params: GenerationParams, pictures: int) -> dict[str, Any]:
    """The tokens of a request of which ``pictures`` pictures are told."""
    resolved = outcome.resolved
    drawn = _tokens((resolved.width, resolved.height)) * pictures
    seen = sum(_tokens(fitted_size(reference)) for reference in params.references)
    read = outcome.prompt_tokens + seen
    return {
        "input_tokens": read,
        "output_tokens": drawn,
        "total_tokens": read + drawn,
        "input_tokens_details": {
            "text_tokens": outcome.prompt_tokens,
            "image_tokens": seen,
        },
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
    }


def common_keys(resolved: Resolved, asked: ImagesRequest) -> dict[str, Any]:
    """What an answer and the events of a stream both say of their pictures."""
    quality = asked.told_quality
    return {
        "background": "opaque",
        "output_format": asked.format,
        **({} if quality is None else {"quality": quality}),
        "size": f"{resolved.width}x{resolved.height}",
    }


def images_json(
    outcome: JobOutcome,
    asked: ImagesRequest,
    params: GenerationParams,
    *,
    warnings: list[str],
    request_id: str,
    created_s: int,
    addresses: list[str] | None,
) -> bytes:
    """The answer's body. Slow for large pictures: call it off the event loop.

    Args:
        addresses: where the pictures can be fetched; None puts them into the answer.
    """
    answer = {
        "id": request_id,
        "created": created_s,
        "model": outcome.model,
        "data": [
            {
                **(
                    {"b64_json": base64_of(picture)} if addresses is None else {"url": addresses[i]}
                ),
                "seed": picture.seed,
            }
            for i, picture in enumerate(outcome.pictures)
        ],
        **common_keys(outcome.resolved, asked),
        "usage": usage_of(outcome, params, len(outcome.pictures)),
        **additions(outcome, warnings),
    }
    return json.dumps(answer, ensure_ascii=False).encode()


def additions(outcome: JobOutcome, warnings: list[str]) -> dict[str, Any]:
    """What this service tells beyond the contract."""
    return {
        "timings": {f"{name}_ms": round(ms, 3) for name, ms in outcome.timings_ms.items()},
        "cache_hit": outcome.cache_hit,
        "warnings": [*outcome.warnings, *warnings],
    }


def base64_of(picture: PackedPicture) -> str:
    """The file as text."""
    return base64.b64encode(picture.data).decode("ascii")


def _tokens(size: tuple[int, int]) -> int:
    return (size[0] // SIZE_MULTIPLE) * (size[1] // SIZE_MULTIPLE)
