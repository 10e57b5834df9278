"""``/v1/images/generations``, ``/edits`` and ``/variations``, with and without ``/v1``."""

from __future__ import annotations

import functools
import time

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from app.api.bodies import (
    JSON_TYPE,
    Form,
    check_form,
    check_json,
    is_form,
    parse_fields,
    read_form,
    read_json,
)
from app.api.documents import (
    EVENTS_CONTENT,
    FILE_SCHEMA,
    FILES_SCHEMA,
    JOB_ERRORS,
    Responses,
    errors,
    form_body,
    form_schema,
    json_body,
    json_or_form_body,
)
from app.api.drawing import Drawing, written
from app.api.event_stream import EVENTS_TYPE
from app.api.openai.answers import ImagesAnswer, images_json
from app.api.openai.events import ImageNarrator, Kind
from app.api.openai.fields import EditForm, EditRequest, ImagesRequest, VariationForm
from app.api.openai.models import ModelNames
from app.api.openai.reading import read_fields, with_pictures
from app.api.picture_links import PictureLinks, address_of
from app.api.request_routes import RequestRoute
from app.engine import JobOptions
from app.errors import InvalidRequestError, MissingParameterError


def image_routes(drawing: Drawing, links: PictureLinks, names: ModelNames) -> APIRouter:
    """The routes, bound to an engine."""
    router = APIRouter(route_class=RequestRoute)

    async def generations(request: Request) -> Response:
        """Draw pictures from a prompt.

        With ``stream``, events are OpenAI's: ``image_generation.partial_image`` up to
        ``partial_images`` times, then ``image_generation.completed`` for each picture, or
        ``error``. Unknown fields are ignored.
        """
        check_json(request)
        return await draw(
            request,
            await read_json(request, ImagesRequest),
            Form(),
            kind="image_generation",
            needs_picture=False,
        )

    async def edits(request: Request) -> Response:
        """Draw pictures from a prompt and pictures, or draw the part under a mask again.

        Files of a form are called ``image`` or ``image[]``. With ``stream``, events are
        ``image_edit.partial_image`` and ``image_edit.completed``, as for generations.
        """
        if is_form(request):
            form = await read_form(request, drawing.settings.max_body_bytes)
            return await draw(request, parse_fields(form, EditForm), form)
        asked, form = (await read_json(request, EditRequest)).parted()
        return await draw(request, asked, form, name="images")

    async def variations(request: Request) -> Response:
        """Draw pictures that are like one: an edit with a prompt of the service's own."""
        check_form(request)
        form = await read_form(request, drawing.settings.max_body_bytes)
        if form.mask is not None:
            raise InvalidRequestError("a variation takes no mask; use edits", param="mask")
        return await draw(request, parse_fields(form, VariationForm), form)

    async def draw(
        request: Request,
        asked: ImagesRequest,
        form: Form,
        *,
        kind: Kind = "image_edit",
        name: str = "image",
        needs_picture: bool = True,
    ) -> Response:
        names.check(asked.model)
        drawn = read_fields(asked, drawing.settings, has_pictures=needs_picture)
        if needs_picture and not form.references:
            raise MissingParameterError("image is required: PNG, JPEG or WebP", param="image")
        pictures = await drawing.pictures(request, form.references, form.mask, name)
        form.drop_pictures()
        if pictures.mask is None:
            params = with_pictures(drawn, pictures, name)
        else:
            params = await anyio.to_thread.run_sync(with_pictures, drawn, pictures, name)
        job = drawing.submit(request, params, drawn.packing, JobOptions(previews=drawn.previews))
        if asked.stream:
            return drawing.stream(job, ImageNarrator(kind, asked, job, drawn.warnings))
        outcome = await drawing.outcome(request, job)
        addresses = None
        if asked.wants_url:
            names_of_links = [links.keep(made) for made in outcome.pictures]
            request.state.links = names_of_links
            addresses = [address_of(request, name) for name in names_of_links]
        answer = functools.partial(
            images_json,
            outcome,
            asked,
            params,
            warnings=drawn.warnings,
            request_id=job.request_id,
            created_s=int(time.time()),
            addresses=addresses,
        )
        return Response(await written(outcome, answer), media_type=JSON_TYPE)

    edit_form = form_schema(
        EditForm, {"image": FILES_SCHEMA, "mask": FILE_SCHEMA}, required=("prompt", "image")
    )
    variation_form = form_schema(VariationForm, {"image": FILES_SCHEMA}, required=("image",))
    for path, route, body in (
        ("generations", generations, json_body(ImagesRequest)),
        ("edits", edits, json_or_form_body(EditRequest, edit_form)),
        ("variations", variations, form_body(variation_form)),
    ):
        for prefix in ("/v1", ""):
            router.add_api_route(
                f"{prefix}/images/{path}",
                route,
                methods=["POST"],
                include_in_schema=bool(prefix),
                responses=_responses(),
                openapi_extra=body,
                response_class=Response,
            )
    return router


def _responses() -> Responses:
    answer = {
        "model": ImagesAnswer,
        "description": "The pictures, or addresses of them; with stream, events. "
        "Each picture of a stream has a completed event of its own.",
        "content": {EVENTS_TYPE: EVENTS_CONTENT},
    }
    return {200: answer, **errors(404, *JOB_ERRORS)}
