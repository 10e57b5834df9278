"""Which jobs take their steps as one, and how many.

A joint step costs less than the steps one by one, where the pipeline's trials showed so, but the
job that was to go first ends later by it. So steps are joined where that makes the sum of all
jobs' waits smaller: when enough others wait behind them. Pure: has no clock, locks or threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from app.engine.contract import Resolved
from fluxcore.fitting import fitted_size
from fluxcore.params import GenerationParams

COUNTS = (2, 4)
"""Jobs that are joined: as many as calls in ``fluxcore.pipeline.joint_steps``."""
HOPED_SHARE = 0.85
"""What is supposed of an untried number: a joint step's time for each job, of a step alone."""
LIKENESSES_KEPT = 64


def likeness(params: GenerationParams, resolved: Resolved) -> Hashable | None:
    """Equal for jobs whose steps may be taken as one; None for jobs of several pictures.

    These are drawn side by side as it is.
    """
    if len(resolved.seeds) > 1:
        return None
    return (
        (resolved.width, resolved.height),
        tuple(fitted_size(picture) for picture in params.references),
        (params.schedule, params.power_alpha if params.schedule == "power" else None),
        (resolved.steps, resolved.start_step),
        resolved.guidance is None,
    )


class Joining:
    """What the trials showed, and what follows from it."""

    def __init__(self) -> None:
        self._shares: OrderedDict[tuple[Hashable, int], float] = OrderedDict()

    def learned(self, kind: Hashable, count: int, share: float) -> None:
        """A step of so many jobs at once takes this share of the steps one by one."""
        self._shares[kind, count] = share
        self._shares.move_to_end((kind, count))
        if len(self._shares) > LIKENESSES_KEPT * len(COUNTS):
            self._shares.popitem(last=False)

    def may_pay(self, kind: Hashable) -> bool:
        """Whether any number may be worth joining, as far as is known."""
        return any(self.share(kind, count) < 1 for count in COUNTS)

    def is_untried(self, kind: Hashable, count: int) -> bool:
        """Whether a trial is needed before so many are joined."""
        return (kind, count) not in self._shares

    def share(self, kind: Hashable, count: int) -> float:
        """As ``learned`` was told; before that what can be hoped for."""
        return 1.0 if count == 1 else self._shares.get((kind, count), HOPED_SHARE)

    def best(self, kind: Hashable, alike: int, jobs: int) -> int:
        """How many of the jobs that are alike to join now, all jobs there are being as long.

        Args:
            alike: those that could be, and later what is left of them.
            jobs: all there are, these among them.
        """

        others = jobs - alike
        # The least sum of all jobs' times until they are done, in units of one job's work, by how
        # many are left of those that could be joined; and how many to join first.
        waits, best = [others * (others + 1) / 2], 1
        for left in range(1, alike + 1):
            found = {
                count: (others + left) * count * self.share(kind, count) + waits[left - count]
                for count in (1, *COUNTS)
                if count <= left
            }
            best = min(found, key=lambda count: found[count])
            waits.append(found[best])
        return best
