"""The events of the OpenAI image streams: partial images, then one ``completed`` per picture.

No event types but those of the contract: its clients know no others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from app.api.event_stream import event_bytes
from app.api.openai.answers import additions, base64_of, common_keys, usage_of
from app.api.openai.fields import ImagesRequest
from app.engine import Job, JobEvent, JobOutcome, Preview
from app.errors import ServiceError

Kind = Literal["image_generation", "image_edit"]


class ImageNarrator:
    """Tells of one job.

    Args:
        kind: begins the names of the events.
        warnings: about the request, besides the model's.
    """

    def __init__(self, kind: Kind, asked: ImagesRequest, job: Job, warnings: list[str]) -> None:
        self._kind = kind
        self._asked = asked
        self._job = job
        self._warnings = warnings
        self._partials: Counter[int] = Counter()

    def progress(self, event: JobEvent) -> bytes:
        """A partial image; of places and steps the contract knows nothing."""
        if not isinstance(event, Preview):
            return b""
        index = self._partials[event.image_index]
        self._partials[event.image_index] += 1
        return self._event(
            "partial_image",
            {
                "b64_json": base64_of(event.picture),
                **self._common(),
                "partial_image_index": index,
                "image_index": event.image_index,
            },
        )

    def completed(self, outcome: JobOutcome) -> Iterator[bytes]:
        """One event for each picture, with its own share of the output's tokens."""
        for index, picture in enumerate(outcome.pictures):
            yield self._event(
                "completed",
                {
                    "b64_json": base64_of(picture),
                    **self._common(),
                    "usage": usage_of(outcome, self._job.params, 1),
                    "image_index": index,
                    "seed": picture.seed,
                    **additions(outcome, self._warnings),
                },
            )

    def failed(self, error: ServiceError) -> bytes:
        """Too late for a status."""
        return event_bytes("error", {"type": "error", **error.body()})

    def _common(self) -> dict[str, Any]:
        return {
            "created_at": int(time.time()),
            "quality": "auto",
            **common_keys(self._job.resolved, self._asked),
        }

    def _event(self, name: str, data: dict[str, Any]) -> bytes:
        kind = f"{self._kind}.{name}"
        return event_bytes(kind, {"type": kind, **data})
