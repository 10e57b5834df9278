"""``/v1/jobs``: accepted now, drawn later, fetched whenever; kept across restarts.

Nothing here waits for a job, and nothing for the disk but the request that asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Annotated, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from app.api.bodies import JSON_TYPE, is_form
from app.api.documents import (
    EVENTS_CONTENT,
    JOB_ERRORS,
    errors,
    pictures_content,
)
from app.api.drawing import Drawing
from app.api.event_stream import EVENTS_TYPE, EventStream
from app.api.generate_events import progress_event
from app.api.idempotency import KEY_HEADER, REPLAYED_HEADER, request_key
from app.api.job_answers import (
    END_ID,
    JobAnswer,
    JobList,
    final_event,
    job_answer,
    with_id,
)
from app.api.job_events import JobWatch
from app.api.negotiation import DEFAULT_FORMAT
from app.api.picture_links import base_address
from app.api.schemas import (
    GenerateRequest,
    generate_body,
    options_of,
    packing_of,
    packing_warnings,
    plain_params,
    read_generate,
    with_pictures,
)
from app.engine import Preview, Settled
from app.errors import InvalidRequestError, NotFoundError, StorageError
from app.jobs.answers import RequestKey
from app.jobs.files import is_job_id, new_job_id
from app.jobs.opening import Kept
from app.jobs.records import JobRecord, JobStatus, NewJob, StoredRequest, settled
from app.outbound import MAX_URL_CHARS

logger = logging.getLogger(__name__)

T = TypeVar("T")

JOBS_PATH = "/v1/jobs"
DEFAULT_PAGE = 20
LARGEST_PAGE = 100
# A job may wait for the weekend to be over.
LONGEST_TIMEOUT_S = 7 * 24 * 3600.0
_NO_JOB = "there is no such job, or no longer"
_IMAGE_NAME = re.compile(r"([0-9]{1,3})(\.[a-z]{3,4})?")


class JobRequest(GenerateRequest):
    """What ``POST /v1/jobs`` takes: what ``/v1/generate`` does, and who is told of the end."""

    webhook: Annotated[str, Field(max_length=MAX_URL_CHARS)] | None = Field(
        None, description="Address that is told of the job's end. Its host must be allowed here."
    )


def job_routes(drawing: Drawing, kept: Kept | None) -> APIRouter:
    """The routes, bound to an engine and to what is kept; where nothing is, they say so."""
    router = APIRouter()

    def opened() -> Kept:
        if kept is None:
            raise NotFoundError(
                "this service keeps no jobs (data_dir is off); use POST /v1/generate",
                code="jobs_off",
            )
        return kept

    async def find(request: Request, job_id: str) -> JobRecord:
        """The job, if it exists and the client may see it."""
        if not is_job_id(job_id):
            raise NotFoundError(_NO_JOB, code="job_not_found")
        record = await _stored(opened().jobs.store.get(job_id))
        # Without keys, whoever has an id, which cannot be guessed, was told of it.
        if drawing.settings.api_keys and record.client != request.state.client:
            raise NotFoundError(_NO_JOB, code="job_not_found")
        return record

    def shown(request: Request, record: JobRecord) -> JobAnswer:
        jobs = opened().jobs
        events = () if record.status.is_final else jobs.current(record.id)
        base_url = base_address(request) + JOBS_PATH
        return job_answer(record, events, jobs.start_step(record.id), base_url)

    async def repeated(key: RequestKey) -> JobRecord | None:
        found = opened().jobs.store.find_repeat(key.client, key.key, key.fingerprint)
        return await _stored(found)

    def accepted(request: Request, record: JobRecord, *, is_repeat: bool) -> Response:
        answer = shown(request, record)
        headers = {"Location": answer.urls.job}
        if is_repeat:
            headers[REPLAYED_HEADER] = "true"
        return Response(
            answer.model_dump_json(), status_code=202, media_type=JSON_TYPE, headers=headers
        )

    @router.post(
        JOBS_PATH,
        status_code=202,
        response_model=JobAnswer,
        openapi_extra=generate_body(JobRequest, LONGEST_TIMEOUT_S),
        responses=errors(404, 422, *JOB_ERRORS),
    )
    async def create(request: Request) -> Response:
        """Accept a job. It is drawn even if the service ends and starts again meanwhile.

        The address in ``webhook`` is told of the end: a ``POST`` of ``type`` (``job.completed``,
        ``job.failed`` or ``job.cancelled``), ``timestamp`` and ``data`` (the job), signed as
        Standard Webhooks says and repeated up to five times within 75 minutes until it is
        answered with 2xx. Redirects are not followed.
        """
        jobs = opened().jobs
        # Refused before its body is read.
        is_form(request)
        body = await request.body()
        key = await request_key(request, body) if KEY_HEADER in request.headers else None
        known = None if key is None else await repeated(key)
        if known is not None:
            return accepted(request, known, is_repeat=True)
        asked = await read_generate(request, drawing.settings, JobRequest)
        if asked.stream:
            raise InvalidRequestError(
                "stream must be left out: the answer's urls.events streams", param="stream"
            )
        if asked.webhook is not None:
            opened().webhooks.check(asked.webhook)
        options = options_of(asked, LONGEST_TIMEOUT_S)
        params = plain_params(asked, drawing.settings, drawing.engine.default_side_px)
        packing = packing_of(asked, asked.output_format or DEFAULT_FORMAT)
        await _stored(jobs.store.check_limits())
        pictures = await drawing.decode(asked.images or (), asked.mask)
        params = with_pictures(params, asked, pictures)
        params = settled(params, drawing.engine.check_request(params))
        created_s = time.time()
        new = NewJob(
            id=new_job_id(),
            client=request.state.client,
            request_id=request.state.request_id,
            priority=options.priority,
            created_s=created_s,
            deadline_s=None if options.deadline_s is None else created_s + options.deadline_s,
            request=StoredRequest.of(
                params,
                packing,
                previews=options.previews,
                warnings=tuple(packing_warnings(asked, packing.format)),
            ),
            webhook=asked.webhook,
            idempotency_key=None if key is None else key.key,
            fingerprint=None if key is None else key.fingerprint,
        )
        taken = await anyio.to_thread.run_sync(jobs.accept, new, params)
        return accepted(request, taken.record, is_repeat=taken.is_repeat)

    @router.get(JOBS_PATH, responses=errors(400, 404))
    async def page(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE)] = DEFAULT_PAGE,
        after: Annotated[str | None, Query(description="The last page's next.")] = None,
        status: JobStatus | None = None,
    ) -> JobList:
        """The client's own jobs, the newest first."""
        store = opened().jobs.store
        if after is not None and not is_job_id(after):
            raise InvalidRequestError("after must be the id of a job", param="after")
        try:
            records, has_more = await _stored(
                store.page(request.state.client, limit, after=after, status=status)
            )
        except NotFoundError:
            raise InvalidRequestError(
                "after is the id of no job, or no longer; begin with the first page", param="after"
            ) from None
        return JobList(
            data=[shown(request, record) for record in records],
            has_more=has_more,
            next=records[-1].id if has_more else None,
        )

    @router.get(f"{JOBS_PATH}/{{job_id}}", responses=errors(404))
    async def get(request: Request, job_id: str) -> JobAnswer:
        """How a job stands, and what came of it."""
        return shown(request, await find(request, job_id))

    @router.delete(f"{JOBS_PATH}/{{job_id}}", responses=errors(400, 404))
    async def cancel(
        request: Request,
        job_id: str,
        forget: Annotated[
            bool, Query(description="Remove the job and its pictures, too, if it has ended.")
        ] = False,
    ) -> JobAnswer:
        """Cancel a job that has not ended. One that has stays as it is, unless forgotten."""
        jobs = opened().jobs
        await find(request, job_id)
        await _on_thread(partial(jobs.cancel, job_id))
        answer = shown(request, await find(request, job_id))
        if forget:
            await _on_thread(partial(jobs.remove, job_id))
        return answer

    @router.get(
        f"{JOBS_PATH}/{{job_id}}/images/{{name}}",
        response_class=Response,
        responses={
            200: {"description": "The picture.", "content": pictures_content()},
            **errors(404),
        },
    )
    async def image(request: Request, job_id: str, name: str) -> Response:
        """A picture of a completed job, by its number from 0; an ending changes nothing."""
        record = await find(request, job_id)
        if record.outcome is None:
            raise NotFoundError(f"the job is {record.status}; it has no pictures", code="no_image")
        match = _IMAGE_NAME.fullmatch(name)
        pictures = record.outcome["pictures"]
        if match is None or int(match[1]) >= len(pictures):
            raise NotFoundError(
                f"the job has pictures 0 to {len(pictures) - 1}; they are called by number",
                code="no_image",
            )
        index = int(match[1])
        seed, kind = pictures[index]["seed"], pictures[index]["format"]
        read = partial(opened().jobs.files.read_result, job_id, index, kind)
        try:
            data = await anyio.to_thread.run_sync(read)
        except FileNotFoundError:
            raise NotFoundError(_NO_JOB, code="job_not_found") from None
        except OSError as error:
            raise _storage_error(error) from None
        return Response(
            data,
            media_type=f"image/{kind}",
            headers={
                "Cache-Control": "private, immutable, max-age=86400",
                "Content-Disposition": f'inline; filename="fluxd-{seed}.{kind}"',
            },
        )

    @router.get(
        f"{JOBS_PATH}/{{job_id}}/events",
        response_class=Response,
        responses={
            200: {
                "description": "What becomes of the job.",
                "content": {EVENTS_TYPE: EVENTS_CONTENT},
            },
            204: {"description": "The client that reconnects has heard the end."},
            **errors(404),
        },
    )
    async def events(request: Request, job_id: str) -> Response:
        """How a job stands now, then what becomes of it, as server-sent events.

        ``queued``, ``started``, ``step`` and ``preview`` are as in ``POST /v1/generate``. The
        last one is named after the job's final status. A stream that ends without it was cut,
        by a restart for one: ask again.
        """
        record = await find(request, job_id)
        if record.status.is_final and request.headers.get("last-event-id") == END_ID:
            return Response(status_code=204)
        return EventStream(story(request, record))

    async def story(request: Request, record: JobRecord) -> AsyncGenerator[bytes, None]:
        jobs, pictures = opened().jobs, record.request.params["n"]
        watch = JobWatch(partial(jobs.watch, record.id))
        number = 0
        try:
            while not isinstance(event := await watch.next(), Settled):
                number += 1
                tell = partial(progress_event, event, jobs.start_step(record.id), pictures)
                is_slow = isinstance(event, Preview)
                told = await anyio.to_thread.run_sync(tell) if is_slow else tell()
                yield with_id(str(number), told)
        finally:
            watch.close()
        try:
            record = await find(request, record.id)
        except NotFoundError:
            # Forgotten as soon as it had ended.
            return
        if record.status.is_final:
            yield final_event(shown(request, record))

    return router


async def _stored(asked: Future[T]) -> T:
    """What the database answers.

    Raises:
        StorageError: it does not.
    """
    try:
        return await asyncio.wrap_future(asked)
    except sqlite3.Error as error:
        raise _storage_error(error) from None


async def _on_thread(change: Callable[[], T]) -> T:
    """The same for what blocks."""
    try:
        return await anyio.to_thread.run_sync(change)
    except (sqlite3.Error, OSError) as error:
        raise _storage_error(error) from None


def _storage_error(error: Exception) -> StorageError:
    logger.error("the data directory cannot be used: %s", error)
    return StorageError("the service cannot read or write what it keeps; its log says why")
