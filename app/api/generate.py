"""``POST /v1/generate``: the native route."""

from __future__ import annotations

import time
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from app.api.bodies import JSON_TYPE
from app.api.documents import (
    EVENTS_CONTENT,
    JOB_ERRORS,
    Responses,
    errors,
    pictures_content,
)
from app.api.drawing import Drawing, written
from app.api.event_stream import EVENTS_TYPE
from app.api.generate_events import GenerateNarrator
from app.api.negotiation import DEFAULT_FORMAT, AnswerKind, choose_answer
from app.api.request_routes import RequestRoute
from app.api.schemas import (
    GenerateRequest,
    GenerateResponse,
    all_warnings,
    generate_body,
    options_of,
    packing_of,
    plain_params,
    read_generate,
    response_of,
    with_pictures,
    without_pictures,
)
from app.engine import JobOutcome
from app.errors import InvalidRequestError

# Characters that may stand in a header as they are.
_HEADER_SAFE = " !#$&'()*+,/:;=?@[]~"


def generate_routes(drawing: Drawing) -> APIRouter:
    """The route, bound to an engine."""
    router = APIRouter(route_class=RequestRoute)
    longest_s = drawing.settings.request_timeout_s

    @router.post(
        "/v1/generate",
        openapi_extra=generate_body(GenerateRequest, longest_s),
        responses=_responses(),
        response_class=Response,
    )
    async def generate(request: Request) -> Response:
        """Draw pictures. ``Accept: image/png`` (jpeg, webp) gives the bytes of one.

        The bytes come with ``X-Fluxd-Seed``, ``-Size``, ``-Steps``, ``-Model`` and
        ``-Cache-Hit``, and ``X-Fluxd-Warning`` for each warning.

        With ``stream``, events tell how it goes: ``queued`` (``position``, ``eta_s``),
        ``started``, ``step`` (``image_index``, ``step``, ``steps``, ``percent`` of the whole,
        ``eta_s``), ``preview`` (``image_index``, ``step``, ``b64``, ``width``, ``height``,
        ``format``) where ``previews`` are asked for, and last ``completed``, which holds the
        whole answer, or ``error``. Several pictures may be drawn side by side, so that their
        steps and previews take turns.
        """
        asked = await read_generate(request, drawing.settings, GenerateRequest)
        if asked.stream:
            kind = AnswerKind(is_json=True, format=asked.output_format or DEFAULT_FORMAT)
        else:
            kind = choose_answer(tuple(request.headers.getlist("accept")), asked.output_format)
        params = plain_params(asked, drawing.settings, drawing.engine.default_side_px)
        if params.n > 1 and not kind.is_json:
            raise InvalidRequestError(
                f"n must be 1 where Accept asks for a picture's bytes; got {params.n} "
                f"(several pictures come as {JSON_TYPE})",
                param="n",
            )
        options = options_of(asked, longest_s)
        pictures = await drawing.pictures(request, asked.images or (), asked.mask)
        params = with_pictures(params, asked, pictures)
        asked = without_pictures(asked)
        job = drawing.submit(request, params, packing_of(asked, kind.format), options)
        if asked.stream:
            return drawing.stream(job, GenerateNarrator(asked, job))
        outcome = await drawing.outcome(request, job)
        warnings = all_warnings(outcome, asked, kind.format)
        if not kind.is_json:
            return _picture_answer(outcome, kind, warnings)

        def body() -> bytes:
            created_s = int(time.time())
            answer = response_of(outcome, job.params, warnings, job.request_id, created_s)
            return answer.model_dump_json().encode()

        return Response(await written(outcome, body), media_type=JSON_TYPE)

    return router


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


def _responses() -> Responses:
    answer = {
        "model": GenerateResponse,
        "description": "The pictures as JSON, the bytes of one, or events.",
        "content": {**pictures_content(), EVENTS_TYPE: EVENTS_CONTENT},
    }
    return {200: answer, **errors(406, *JOB_ERRORS)}
