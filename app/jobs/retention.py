"""How long and how much is kept, and when it is time to look for what is too much."""

from __future__ import annotations

import time
from dataclasses import dataclass

# A look goes through all records. It is worth it once so much has come to what may be kept, ...
SHARE_OF_LOOKS = 16
# ... or after so many seconds.
LONGEST_S = 60.0


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept: at most so long, and at most so many bytes, the oldest going first."""

    seconds: float
    most_bytes: int


class SweepBudget:
    """When to look again. Not for several threads at once.

    Args:
        most_bytes: what may be kept; it is exceeded by a sixteenth at most.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._left_bytes = 0.0
        self._due_s = 0.0

    def is_spent(self, kept_bytes: int = 0) -> bool:
        """Take note of bytes that are kept; True when somebody must look now."""
        self._left_bytes -= kept_bytes
        now_s = time.monotonic()
        if self._left_bytes > 0 and now_s < self._due_s:
            return False
        self._left_bytes = self._most_bytes / SHARE_OF_LOOKS
        self._due_s = now_s + LONGEST_S
        return True
