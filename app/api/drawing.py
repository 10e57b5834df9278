"""From a checked request to a job and its outcome: what all routes that draw share.

Owns the order in which a request is judged: its cheap fields, then whether there is
room, then its pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import anyio
import anyio.to_thread
from fastapi import Request

from app.api.bodies import Source
from app.api.event_stream import EventStream
from app.api.input_pictures import InputPictures, PictureLimits, decode_pictures
from app.api.job_events import Narrator, job_events
from app.api.security.remote import RemotePictures
from app.api.waiting import outcome_of
from app.engine import Engine, Job, JobOptions, JobOutcome, Packing
from app.engine.jobs import DEFAULT_OPTIONS
from app.errors import InvalidRequestError
from app.settings import Settings
from fluxcore.params import GenerationParams

# Answers with up to so many bytes of pictures are written on the event loop: it takes less
# than handing them to a thread and back, and well under a millisecond.
SMALL_ANSWER_BYTES = 64 * 1024
# Pictures of different requests that are decoded at a time: bounds memory and threads.
DECODING_THREADS = 2


class Drawing:
    """The engine and the settings, as the routes use them."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self._limits = PictureLimits(settings.max_image_bytes, settings.max_image_pixels)
        self._remote = RemotePictures(settings)
        self._decoding = anyio.Semaphore(DECODING_THREADS)

    async def pictures(
        self,
        request: Request,
        references: Sequence[Source],
        mask: Source | None,
        name: str = "images",
    ) -> InputPictures:
        """Decode a request's pictures, if there is room for a job of its client; see ``decode``.

        Raises:
            InvalidRequestError: naming the picture that cannot be used.
            ServiceError: no job is taken now.
        """
        self._check_count(references, name)
        if references or mask is not None:
            # Else there is nothing to spare, and the whole request can be judged.
            self.engine.check_admission(request.state.client)
        return await self.decode(references, mask, name)

    async def decode(
        self, references: Sequence[Source], mask: Source | None, name: str = "images"
    ) -> InputPictures:
        """Decode a request's pictures.

        Args:
            name: what the request calls its references.

        Raises:
            InvalidRequestError: naming the picture that cannot be used.
        """
        self._check_count(references, name)
        if not references and mask is None:
            return InputPictures((), None)
        references, mask = await self._remote.fetch_all(references, mask, name)
        async with self._decoding:
            return await anyio.to_thread.run_sync(
                decode_pictures, references, mask, self._limits, name
            )

    def _check_count(self, references: Sequence[Source], name: str) -> None:
        allowed = self.settings.max_references
        if len(references) > allowed:
            raise InvalidRequestError(
                f"at most {allowed} images are allowed; got {len(references)}", param=name
            )

    def submit(
        self,
        request: Request,
        params: GenerationParams,
        packing: Packing,
        options: JobOptions = DEFAULT_OPTIONS,
    ) -> Job:
        """Accept the request as a job of the client that asks, or refuse it.

        Its deadline is the setting ``request_timeout_s`` where ``options`` has none.

        Raises:
            InvalidParamsError: it does not fit the loaded model.
            ServiceError: no job is taken now.
        """
        options = dataclasses.replace(
            options,
            client=request.state.client,
            deadline_s=options.deadline_s or self.settings.request_timeout_s,
        )
        job = self.engine.submit(params, packing, request.state.request_id, options)
        # Its pictures are decoded; from here on queue_pixels bounds what it holds.
        request.state.drop_body()
        return job

    async def outcome(self, request: Request, job: Job) -> JobOutcome:
        """Wait for the job; see ``outcome_of``."""
        return await outcome_of(request, self.engine, job, _timeout_s(job))

    def stream(self, job: Job, narrator: Narrator) -> EventStream:
        """The job's events as an answer."""
        return EventStream(job_events(self.engine, job, narrator, _timeout_s(job)))


async def written(outcome: JobOutcome, write: Callable[[], bytes]) -> bytes:
    """What ``write`` makes of the outcome's pictures; off the event loop where they are large."""
    if sum(len(picture.data) for picture in outcome.pictures) <= SMALL_ANSWER_BYTES:
        return write()
    return await anyio.to_thread.run_sync(write)


def _timeout_s(job: Job) -> float:
    assert job.options.deadline_s is not None, "whoever waits for a job waits for so long"
    return job.options.deadline_s
