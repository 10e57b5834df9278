"""What is kept of a job: its request, where it stands and what came of it.

Owns the notation in which requests and outcomes are stored. Knows nothing of how
and where they are.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from PIL import Image

from app.engine import JobOutcome
from app.engine.contract import Resolved
from app.engine.packing import Packing
from app.errors import ServiceError
from fluxcore.params import GenerationParams


class JobStatus(StrEnum):
    """Where a kept job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self in FINAL


# A seed that nobody asked for is short enough to be typed.
SEED_BITS = 32

FINAL = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})


def settled(params: GenerationParams, resolved: Resolved) -> GenerationParams:
    """The request with what it leaves open, so that it draws the same whenever it is run.

    Args:
        resolved: it with the defaults of the model that is loaded now; later it may be another.
    """
    open_fields: dict[str, Any] = {
        "steps": resolved.steps,
        # A scale of 1 is none.
        "guidance": 1.0 if resolved.guidance is None else resolved.guidance,
        "seed": secrets.randbits(SEED_BITS),
    }
    if params.mask is None:
        # Else the size is the picture's own, on every model.
        open_fields |= {"width": resolved.width, "height": resolved.height}
    left_open = {n: value for n, value in open_fields.items() if getattr(params, n) is None}
    return dataclasses.replace(params, **left_open)


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """All of a request but its pictures, as it was accepted.

    Attributes:
        params: the fields of ``GenerationParams`` that are plain values.
        references: how many pictures came with it.
        warnings: what was known to have no effect before the job ran.
    """

    params: dict[str, Any]
    picture_format: str
    quality: int
    references: int
    has_mask: bool
    previews: int
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        params: GenerationParams,
        packing: Packing,
        *,
        previews: int = 0,
        warnings: tuple[str, ...] = (),
    ) -> StoredRequest:
        """What to keep of a request."""
        return cls(
            params=params.summary(),
            picture_format=packing.format,
            quality=packing.quality,
            references=len(params.references),
            has_mask=params.mask is not None,
            previews=previews,
            warnings=warnings,
        )

    def packing(self) -> Packing:
        """How its pictures are to be written."""
        return Packing(self.picture_format, self.quality)  # type: ignore[arg-type]

    def generation(
        self, references: tuple[Image.Image, ...] = (), mask: Image.Image | None = None
    ) -> GenerationParams:
        """The request again, with its pictures.

        Raises:
            InvalidParamsError: this version of the program no longer allows it.
        """
        return GenerationParams(**self.params, references=references, mask=mask)

    def to_json(self) -> str:
        """The form in which it is stored."""
        return json.dumps(
            {
                "params": self.params,
                "format": self.picture_format,
                "quality": self.quality,
                "references": self.references,
                "has_mask": self.has_mask,
                "previews": self.previews,
                "warnings": self.warnings,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> StoredRequest:
        """The inverse of ``to_json``."""
        found = json.loads(text)
        return cls(
            params=found["params"],
            picture_format=found["format"],
            quality=found["quality"],
            references=found["references"],
            has_mask=found["has_mask"],
            previews=found["previews"],
            warnings=tuple(found["warnings"]),
        )


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One row. Times are seconds since 1970, by the wall clock: they outlive the process.

    Attributes:
        number: grows with every job that is accepted.
        id: unguessable; what clients know the job by.
        client: who asked; lists are per client.
        deadline_s: when it is given up, if ever.
        attempts: how often it was begun; more than one after crashes.
        outcome: of a completed job, everything but the pictures' bytes.
        error: of a failed job, the error's fields as clients see them.
        input_bytes: what the pictures that came with it take on the disk, while it waits.
        kept_bytes: what is kept of it once it has ended, all in all.
    """

    number: int
    id: str
    client: str
    request_id: str
    status: JobStatus
    priority: str
    created_s: float
    deadline_s: float | None
    started_s: float | None
    finished_s: float | None
    attempts: int
    request: StoredRequest
    outcome: dict[str, Any] | None
    error: dict[str, str | None] | None
    webhook: str | None
    input_bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is about to be accepted; see ``JobRecord``.

    Attributes:
        idempotency_key: the client's word for this request, if it gave one.
        fingerprint: of the request that the key stands for.
    """

    id: str
    client: str
    request_id: str
    priority: str
    created_s: float
    deadline_s: float | None
    request: StoredRequest
    webhook: str | None = None
    input_bytes: int = 0
    idempotency_key: str | None = None
    fingerprint: str | None = None


def outcome_json(outcome: JobOutcome) -> str:
    """Everything of an outcome but the pictures' bytes, as it is stored."""
    resolved = outcome.resolved
    return json.dumps(
        {
            "model": outcome.model,
            "width": resolved.width,
            "height": resolved.height,
            "steps": resolved.steps,
            "guidance": resolved.guidance,
            "timings_ms": {name: round(ms, 3) for name, ms in outcome.timings_ms.items()},
            "cache_hit": outcome.cache_hit,
            "warnings": list(outcome.warnings),
            "pictures": [
                {
                    "seed": picture.seed,
                    "width": picture.width,
                    "height": picture.height,
                    "format": picture.format,
                    "bytes": len(picture.data),
                }
                for picture in outcome.pictures
            ],
        }
    )


def error_json(error: ServiceError) -> str:
    """An error's fields as clients see them, as they are stored."""
    return json.dumps(error.body()["error"])


def new_delivery_id() -> str:
    """A name for one piece of news, by which a receiver knows its repetitions."""
    return f"msg_{secrets.token_hex(16)}"


def webhook_body(record: JobRecord) -> str:
    """What a webhook says of a job that has ended; the pictures are fetched from the service."""
    assert record.finished_s is not None, "it has ended"
    path = f"/v1/jobs/{record.id}"
    pictures = [] if record.outcome is None else record.outcome["pictures"]
    ended = dt.datetime.fromtimestamp(record.finished_s, dt.UTC)
    return json.dumps(
        {
            "type": f"job.{record.status}",
            "timestamp": ended.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "data": {
                "id": record.id,
                "status": record.status,
                "path": path,
                "images": [
                    {"path": f"{path}/images/{index}", **picture}
                    for index, picture in enumerate(pictures)
                ],
                "error": record.error,
            },
        }
    )
