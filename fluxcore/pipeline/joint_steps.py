"""Several calls of the transformer as one, where that was measured to be faster.

Small pictures leave a large device's units idle. Owns the trials that tell how many calls of a
size pay, and the joint calls. Knows nothing of jobs or of who asks.

A row's result must not depend on its neighbours: with ``exact`` only those numbers of calls are
joined whose results were the same, bit for bit, as those of the calls one by one. Libraries of
matrix products choose another algorithm for other numbers of rows, and not all of these add in
one order.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fluxcore.errors import OutOfMemoryError
from fluxcore.pipeline.denoise import Velocity
from fluxcore.runtime import Runtime, translated_errors

logger = logging.getLogger(__name__)

Batching = Literal["off", "exact", "fast"]

COUNTS = (2, 4)
"""Calls that are joined. Each number of each size is a shape, and a recording, of its own."""
LEAST_GAIN = 0.05
"""Share of the time that must be saved."""
LONGEST_TRIED_S = 0.1
"""A call that takes longer keeps the units busy, and a trial of it would keep jobs waiting."""
LONGEST_FIRST_S = 1.0
"""The same of the first call of a size, which may have to be prepared."""
MOST_TOKENS = 8192
"""Of all calls together. Four times as many tokens as a picture of 624x624 has with its text."""
TRIES = 3
SHAPES_KEPT = 64


class JointSteps:
    """Used from the thread that owns the device.

    Args:
        velocity_of: how the transformer is called, with rows of one size or several.
    """

    def __init__(
        self, velocity_of: Callable[..., Tensor], runtime: Runtime, batching: Batching
    ) -> None:
        self._velocity_of = velocity_of
        self._runtime = runtime
        # A compiled network would be compiled anew for each number of rows, and one whose layers
        # are streamed has no room for more than one.
        can_join = not runtime.compiles and runtime.residency != "low"
        self._batching: Batching = batching if can_join else "off"
        # What a call takes as one of so many, of what it takes alone; 1 where it is not joined.
        self._shares: OrderedDict[tuple[torch.Size, torch.Size, int, int], float] = OrderedDict()

    def velocities(self, calls: Sequence[Velocity]) -> list[Tensor]:
        """Answer calls that are alike, together as far as that is known to pay."""
        answers: list[Tensor] = []
        while len(answers) < len(calls):
            left = calls[len(answers) :]
            count = self.best(left[0], len(left))
            if count > 1:
                joint = self._joined(left[:count])
                if joint is None:
                    continue
                answers += joint
            else:
                answers.append(self._velocity_of(*left[0]))
        return answers

    def best(self, call: Velocity, most: int) -> int:
        """How many of at most so many calls to join: 1 where none pay, or none was tried."""
        shares = {1: 1.0} | {c: self.share(call, c) or 1.0 for c in COUNTS if c <= most}
        return min(shares, key=lambda count: shares[count])

    def share(self, call: Velocity, count: int) -> float | None:
        """Time of a call as one of so many, of its time alone; None before a trial."""
        if count == 1 or not self._may_join(call, count):
            return 1.0
        return self._shares.get(_key(call, count))

    def taken(self, call: Velocity, count: int) -> float:
        """Time of so many calls, joined as ``velocities`` does, of that of one alone."""
        time_of_all = 0.0
        while count:
            joined = self.best(call, count)
            time_of_all += joined * (self.share(call, joined) or 1.0)
            count -= joined
        return time_of_all

    def is_untried(self, call: Velocity, most: int) -> bool:
        """Whether ``trial`` would tell anything about at most so many calls."""
        return any(self.share(call, count) is None for count in COUNTS if count <= most)

    def trial(self, call: Velocity, most: int) -> None:
        """Find out which numbers of calls like this one pay, up to so many."""
        untried = [count for count in COUNTS if self.share(call, count) is None]
        wanted = [count for count in untried if count <= most]
        with translated_errors():
            is_long = bool(wanted) and self._is_long(call)
            for count in untried if is_long else wanted:
                share = 1.0 if is_long else self._tried(call, count)
                self._keep(call, count, share)
                logger.info(
                    "%d steps of %d tokens at once: %s",
                    *(count, _tokens(call)),
                    f"each takes {share:.2f} of one alone" if share < 1 else "not joined",
                )

    def _may_join(self, call: Velocity, count: int) -> bool:
        is_allowed = self._batching != "off" and count in COUNTS
        return is_allowed and count * _tokens(call) <= MOST_TOKENS

    def _is_long(self, call: Velocity) -> bool:
        """Whether not even a trial of a size would pay."""
        bounds = (LONGEST_FIRST_S, LONGEST_TRIED_S)
        return any(self._took_s(lambda: self._velocity_of(*call), tries=1) > s for s in bounds)

    def _tried(self, call: Velocity, count: int) -> float:
        """Rows are the call's own, turned, so that no two are equal."""
        rows = [
            call._replace(img=call.img.roll(i, 1), txt=call.txt.roll(i, 1)) for i in range(count)
        ]
        alone = [self._velocity_of(*row) for row in rows]
        joint = self._joined(rows)
        if joint is None:
            return 1.0
        if self._batching == "exact" and not all(map(torch.equal, joint, alone)):
            return 1.0
        alone_s = self._took_s(lambda: self._velocity_of(*call))
        share = self._took_s(lambda: self._joined(rows)) / count / alone_s
        # A share is known by now only if memory was full in one of the tries.
        is_full = self.share(call, count) is not None
        return 1.0 if is_full else worthwhile(share)

    def _took_s(self, work: Callable[[], object], tries: int = TRIES) -> float:
        """The least of some tries: what else the machine does only makes them longer."""
        found = []
        for _ in range(tries):
            self._runtime.synchronize()
            begun = time.perf_counter()
            work()
            self._runtime.synchronize()
            found.append(time.perf_counter() - begun)
        return min(found)

    def _joined(self, calls: Sequence[Velocity]) -> list[Tensor] | None:
        """All as one call; None where they do not fit into memory, which is not tried again."""
        first = calls[0]
        try:
            with translated_errors():
                img = torch.cat([call.img for call in calls])  # [B, L_img, C]
                txt = torch.cat([call.txt for call in calls])  # [B, L_txt, D]
                velocity = self._velocity_of(img, txt, first.modulation, first.pe, first.tokens)
        except OutOfMemoryError as error:
            logger.warning("%d steps at once do not fit, one by one may: %s", len(calls), error)
            self._keep(first, len(calls), 1.0)
        else:
            return list(velocity.split(1))
        # Outside the except block: its traceback holds the tensors that filled the memory.
        self._runtime.release_memory()
        return None

    def _keep(self, call: Velocity, count: int, share: float) -> None:
        self._shares[_key(call, count)] = share
        self._shares.move_to_end(_key(call, count))
        if len(self._shares) > SHAPES_KEPT * len(COUNTS):
            self._shares.popitem(last=False)


def worthwhile(share: float) -> float:
    """A share of the time, or 1 where it saves too little."""
    return share if share <= 1 - LEAST_GAIN else 1.0


def _key(call: Velocity, count: int) -> tuple[torch.Size, torch.Size, int, int]:
    """All that decides which products of which sizes are computed."""
    return call.img.shape, call.txt.shape, call.tokens, count


def _tokens(call: Velocity) -> int:
    """Of text and pictures."""
    return call.img.shape[1] + call.txt.shape[1]
