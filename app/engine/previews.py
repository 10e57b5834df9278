"""Previews: after which steps, and the picture that the model sees coming.

Decoded from the predicted clean latents, never from the noisy ones. A preview that
cannot be made costs the job nothing but itself.
"""

from __future__ import annotations

import logging

from app.engine.contract import Pipeline, Slice
from app.engine.jobs import Job
from fluxcore.drawn import DrawnPicture
from fluxcore.errors import FluxError

logger = logging.getLogger(__name__)


def preview_steps(wanted: int, first: int, last: int) -> frozenset[int]:
    """The steps to show, evenly spread over ``first`` to ``last`` - 1.

    The last step is not among them: what follows it is the picture itself.
    """
    count = min(wanted, last - first)
    span = last - first + 1
    return frozenset(first - 1 + span * (i + 1) // (count + 1) for i in range(count))


class Previewer:
    """Makes one job's previews. Used from the worker's thread only."""

    def __init__(self, job: Job, pipeline: Pipeline) -> None:
        resolved = job.resolved
        self._pipeline = pipeline
        self._size = (resolved.width, resolved.height)
        self._steps = preview_steps(job.options.previews, resolved.start_step + 1, resolved.steps)

    def picture_after(self, done: Slice) -> DrawnPicture | None:
        """The preview that is due after a slice, if one is."""
        if done.denoise_step is None or done.step not in self._steps:
            return None
        try:
            return self._pipeline.decode(done.denoise_step.predicted_clean(), *self._size)
        except FluxError as error:
            # The picture itself may yet come out; if not, that error is the job's.
            self._steps = frozenset()
            logger.warning("no more previews of this job: %s", error)
        return None
