"""``POST /v1/generate``: the native route."""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import quote

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response

from app.api.input_pictures import InputPictures, decode_pictures
from app.api.negotiation import FORMATS, JSON_TYPE, AnswerKind, choose_answer
from app.api.schemas import (
    GenerateRequest,
    GenerateResponse,
    all_warnings,
    packing_of,
    parse_generate,
    plain_params,
    response_json,
    with_pictures,
)
from app.api.waiting import outcome_of
from app.engine import Engine, JobOutcome
from app.errors import InvalidRequestError, MediaTypeError
from app.settings import Settings

logger = logging.getLogger(__name__)

# Pictures of different requests that are decoded at a time: bounds memory and threads.
DECODING_THREADS = 2
# Bodies up to this size are parsed on the event loop; it takes well under a millisecond.
SMALL_BODY_BYTES = 64 * 1024
# Characters that may stand in a header as they are.
_HEADER_SAFE = " !#$&'()*+,/:;=?@[]~"


def generate_routes(engine: Engine, settings: Settings) -> APIRouter:
    """The route, bound to an engine."""
    router = APIRouter()
    decoding = anyio.Semaphore(DECODING_THREADS)

    async def read_pictures(asked: GenerateRequest) -> InputPictures:
        references = asked.images or []
        if len(references) > settings.max_references:
            raise InvalidRequestError(
                f"at most {settings.max_references} images are allowed; got {len(references)}",
                param="images",
            )
        if not references and asked.mask is None:
            return InputPictures((), None)
        async with decoding:
            return await anyio.to_thread.run_sync(
                decode_pictures, references, asked.mask, settings.max_image_pixels
            )

    @router.post("/v1/generate", openapi_extra=_request_schema(), responses=_response_schemas())
    async def generate(request: Request) -> Response:
        """Draw pictures. ``Accept: image/png`` (jpeg, webp) gives the bytes of one."""
        _check_content_type(request)
        body = await request.body()
        if len(body) <= SMALL_BODY_BYTES:
            asked = parse_generate(body)
        else:
            asked = await anyio.to_thread.run_sync(parse_generate, body)
        kind = choose_answer(request.headers.getlist("accept"), asked.output_format)
        params = plain_params(asked, settings)
        if params.n > 1 and not kind.is_json:
            raise InvalidRequestError(
                f"n must be 1 where Accept asks for a picture's bytes; got {params.n} "
                f"(several pictures come as {JSON_TYPE})",
                param="n",
            )
        engine.check_admission()
        params = with_pictures(params, asked, await read_pictures(asked))
        request_id = request.state.request_id
        job = engine.submit(params, packing_of(asked, kind.format), request_id)
        outcome = await outcome_of(request, engine, job, settings.request_timeout_s)
        warnings = all_warnings(outcome, asked, kind.format)
        if not kind.is_json:
            return _picture_answer(outcome, kind, warnings)
        content = await anyio.to_thread.run_sync(
            response_json, outcome, params, warnings, request_id, int(time.time())
        )
        return Response(content, media_type=JSON_TYPE)

    return router


def _check_content_type(request: Request) -> None:
    """JSON only, and said so: a web page can send other types across origins unasked."""
    sent = request.headers.get("content-type", "")
    if sent.partition(";")[0].strip().lower() != JSON_TYPE:
        raise MediaTypeError(
            f"Content-Type must be {JSON_TYPE}; got {sent[:80] or 'none'} "
            f"(with curl: -H 'Content-Type: {JSON_TYPE}')"
        )


def _picture_answer(outcome: JobOutcome, kind: AnswerKind, warnings: list[str]) -> Response:
    picture = outcome.pictures[0]
    resolved = outcome.resolved
    headers = {
        "Content-Disposition": f'inline; filename="fluxd-{picture.seed}.{picture.format}"',
        "Server-Timing": ", ".join(
            f"{name};dur={ms:.1f}" for name, ms in outcome.timings_ms.items()
        ),
        "X-Fluxd-Model": quote(outcome.model, safe=_HEADER_SAFE),
        "X-Fluxd-Seed": str(picture.seed),
        "X-Fluxd-Size": f"{picture.width}x{picture.height}",
        "X-Fluxd-Steps": str(resolved.steps),
        "X-Fluxd-Cache-Hit": "true" if outcome.cache_hit else "false",
    }
    if resolved.guidance is not None:
        headers["X-Fluxd-Guidance"] = f"{resolved.guidance:g}"
    answer = Response(picture.data, media_type=f"image/{kind.format}", headers=headers)
    for warning in warnings:
        answer.headers.append("X-Fluxd-Warning", quote(warning, safe=_HEADER_SAFE))
    return answer


def _request_schema() -> dict[str, Any]:
    """The body for the OpenAPI document; the route reads it itself, to say what is wrong."""
    schema = GenerateRequest.model_json_schema()
    return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": schema}}}}


def _response_schemas() -> dict[int | str, dict[str, Any]]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        200: {
            "model": GenerateResponse,
            "description": "The pictures, as JSON or as the bytes of one.",
            "content": {f"image/{name}": binary for name in FORMATS},
        }
    }
