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
        match event:
            case Queued():
                return _event("queued", position=event.position, eta_s=_rounded(event.eta_s))
            case Started():
                return _event("started")
            case StepDone():
                return _event(
                    "step",
                    image_index=event.image_index,
                    step=event.step,
                    steps=event.steps,
                    percent=self._percent(event),
                    eta_s=_rounded(event.eta_s),
                )
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

    def completed(self, outcome: JobOutcome) -> Iterator[bytes]:
        """The whole answer, as it would have come without a stream."""
        job = self._job
        warnings = all_warnings(outcome, self._asked, job.packing.format)
        answer = response_of(outcome, job.params, warnings, job.request_id, int(time.time()))
        yield _event("completed", **answer.model_dump())

    def failed(self, error: ServiceError) -> bytes:
        """The error, as it would have come without a stream."""
        return _event("error", **error.body())

    def _percent(self, event: StepDone) -> float:
        """How much of the job's denoising is done, of all its pictures."""
        resolved = self._job.resolved
        steps = event.steps - resolved.start_step
        done = event.image_index * steps + event.step - resolved.start_step
        return round(100 * done / (steps * len(resolved.seeds)), 1)


def _event(name: str, **data: Any) -> bytes:
    return event_bytes(name, {"type": name, **data})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
