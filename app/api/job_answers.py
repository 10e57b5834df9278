"""How a job stands: the answers of ``/v1/jobs`` and the events of one job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, Field

from app.api.event_stream import event_bytes
from app.api.generate_events import rounded_s, step_fields
from app.api.schemas import UsedParams
from app.engine import JobEvent, PictureFormat, Queued, StepDone
from app.jobs.records import JobRecord, JobStatus

# What tells a client that has heard the end, and asks again, that there is no more.
END_ID = "end"
ENDINGS: dict[PictureFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}


class JobPicture(BaseModel):
    """One picture of a completed job. Units: pixels."""

    url: str
    seed: int
    width: int
    height: int
    format: PictureFormat
    bytes: int


class JobProgress(BaseModel):
    """How far a running job is."""

    image_index: int
    step: int
    steps: int
    percent: float = Field(description="Of the whole job's steps.")
    eta_s: float | None


class JobUrls(BaseModel):
    """Where the job is found."""

    job: str
    events: str
    images: list[str]


class JobError(BaseModel):
    """Why a job failed; as in answers that are errors."""

    message: str
    type: str
    param: str | None
    code: str | None


class JobAnswer(BaseModel):
    """A job. What is not known yet is null or empty; times are Unix times in seconds."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    created: int
    started: int | None
    finished: int | None
    position: int | None = Field(description="While queued: 1 for the next one.")
    eta_s: float | None = Field(description="While queued: when it should begin.")
    progress: JobProgress | None
    prompt: str
    model: str | None
    images: list[JobPicture]
    params: UsedParams | None
    timings: dict[str, float] = Field(description="Milliseconds per stage.")
    cache_hit: bool | None
    warnings: list[str]
    error: JobError | None
    urls: JobUrls


class JobList(BaseModel):
    """A page of jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool
    next: str | None = Field(description="The value of after that gives the next page.")


def job_answer(
    record: JobRecord, events: Iterable[JobEvent], start_step: int, base_url: str
) -> JobAnswer:
    """A job as clients see it.

    Args:
        events: those that hold now; none of a job that is finished.
        start_step: the steps that each of its pictures begins after.
        base_url: where the jobs are found, as the client calls it.
    """
    place: Queued | None = None
    progress: JobProgress | None = None
    for event in events:
        match event:
            case Queued():
                place = event
            case StepDone():
                fields = step_fields(event, start_step, record.request.params["n"])
                progress = JobProgress(**fields)
    url = f"{base_url}/{record.id}"
    images = _images(record, url)
    outcome = record.outcome or {}
    return JobAnswer(
        id=record.id,
        status=record.status,
        created=int(record.created_s),
        started=_seconds(record.started_s),
        finished=_seconds(record.finished_s),
        position=None if place is None else place.position,
        eta_s=None if place is None else rounded_s(place.eta_s),
        progress=progress,
        prompt=record.request.params["prompt"],
        model=outcome.get("model"),
        images=images,
        params=_used_params(record),
        timings={f"{name}_ms": ms for name, ms in outcome.get("timings_ms", {}).items()},
        cache_hit=outcome.get("cache_hit"),
        warnings=[*outcome.get("warnings", ()), *record.request.warnings],
        error=None if record.error is None else JobError(**record.error),
        urls=JobUrls(job=url, events=f"{url}/events", images=[image.url for image in images]),
    )


def final_event(answer: JobAnswer) -> bytes:
    """The last event, named after the job's status."""
    told = {"type": answer.status, **answer.model_dump(mode="json")}
    return with_id(END_ID, event_bytes(answer.status, told))


def with_id(event_id: str, event: bytes) -> bytes:
    """The event with an id, which a client that reconnects sends as ``Last-Event-ID``."""
    return b"id: %s\n%s" % (event_id.encode(), event)


def _images(record: JobRecord, url: str) -> list[JobPicture]:
    found = record.outcome["pictures"] if record.outcome is not None else []
    return [
        JobPicture(url=f"{url}/images/{index}.{ENDINGS[picture['format']]}", **picture)
        for index, picture in enumerate(found)
    ]


def _used_params(record: JobRecord) -> UsedParams | None:
    if record.outcome is None:
        return None
    asked, outcome = record.request.params, record.outcome
    return UsedParams(
        width=outcome["width"],
        height=outcome["height"],
        steps=outcome["steps"],
        guidance=outcome["guidance"],
        schedule=asked["schedule"],
        power_alpha=asked["power_alpha"] if asked["schedule"] == "power" else None,
        negative_prompt=asked["negative_prompt"],
        references=record.request.references,
        strength=asked["strength"] if record.request.has_mask else None,
        n=asked["n"],
    )


def _seconds(at_s: float | None) -> int | None:
    return None if at_s is None else int(at_s)
