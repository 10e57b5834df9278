"""The events of the native stream: queued, started, step, preview, completed, error."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

from app.api.event_stream import event_bytes
from app.api.schemas import GenerateRequest, all_warnings, response_of
from app.engine import Job, JobEvent, JobOutcome, Preview, Queued, Settled, Started, StepDone
from app.errors import ServiceError


class GenerateNarrator:
    """Tells of one job everything that is known of it."""

    def __init__(self, asked: GenerateRequest, job: Job) -> None:
        self._asked = asked
        self._job = job

    def progress(self, event: JobEvent) -> bytes:
        """Where the job stands."""
        resolved = self._job.resolved
        return progress_event(event, resolved.start_step, len(resolved.seeds))

    def completed(self, outcome: JobOutcome) -> Iterator[bytes]:
        """The whole answer, as it would have come without a stream."""
        job = self._job
        warnings = all_warnings(outcome, self._asked, job.packing.format)
        answer = response_of(outcome, job.params, warnings, job.request_id, int(time.time()))
        yield _event("completed", **answer.model_dump())

    def failed(self, error: ServiceError) -> bytes:
        """The error, as it would have come without a stream."""
        return _event("error", **error.body())


def progress_event(event: JobEvent, start_step: int, pictures: int) -> bytes:
    """One event of a job that has not ended, in its form on the wire. Slow for previews.

    Args:
        start_step: the steps that each of the job's pictures begins after.
        pictures: how many the job draws.
    """
    match event:
        case Queued():
            return _event("queued", position=event.position, eta_s=rounded_s(event.eta_s))
        case Started():
            return _event("started")
        case StepDone():
            return _event("step", **step_fields(event, start_step, pictures))
        case Preview():
            picture = event.picture
            return _event(
                "preview",
                image_index=event.image_index,
                step=event.step,
                b64=base64.b64encode(picture.data).decode("ascii"),
                width=picture.width,
                height=picture.height,
                format=picture.format,
            )
        case Settled():
            return b""


def step_fields(event: StepDone, start_step: int, pictures: int) -> dict[str, Any]:
    """What a step tells; percent is of the denoising of all the job's pictures."""
    wanted = (event.steps - start_step) * pictures
    return {
        "image_index": event.image_index,
        "step": event.step,
        "steps": event.steps,
        "percent": round(100 * event.of_all / wanted, 1),
        "eta_s": rounded_s(event.eta_s),
    }


def _event(name: str, **data: Any) -> bytes:
    return event_bytes(name, {"type": name, **data})


def rounded_s(seconds: float | None) -> float | None:
    """As much as an estimate is worth."""
    return None if seconds is None else round(seconds, 2)
