"""How much of the device each client has had, so that none takes it all.

Start-time fair queueing over device seconds: a client that comes (back) starts level
with the one that has had least among those who have jobs, so that idling saves up no
claim and a past burst is not held against anybody for ever.

Source of the idea: Goyal, Vin, Cheng, "Start-time fair queueing", SIGCOMM 1996.
"""

from __future__ import annotations

from dataclasses import dataclass

# A client without jobs still competes until the device has worked so long for others: most
# send their next job a moment after the last one's answer.
ABSENCE_S = 10.0
# Accounts of clients without jobs that are kept; more are dropped, least used first.
IDLE_ACCOUNTS_KEPT = 1000


@dataclass(slots=True)
class _Account:
    """``left_s``: what the device had done for all when the last job ended."""

    used_s: float
    jobs: int = 0
    left_s: float = 0.0


class Shares:
    """Device seconds per client, on a scale on which those who compete can be compared."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        # What the least-served competing client has had; never falls.
        self._level_s = 0.0
        self._served_s = 0.0

    def joined(self, client: str) -> None:
        """One more job of a client is in the system."""
        account = self._accounts.setdefault(client, _Account(self._level_s))
        if account.jobs == 0:
            account.used_s = max(account.used_s, self._level_s)
        account.jobs += 1

    def left(self, client: str) -> None:
        """One job less."""
        account = self._accounts[client]
        account.jobs -= 1
        account.left_s = self._served_s
        if len(self._accounts) > IDLE_ACCOUNTS_KEPT:
            idle = [name for name, account in self._accounts.items() if account.jobs == 0]
            for name in sorted(idle, key=lambda name: self._accounts[name].used_s)[
                : len(idle) // 2
            ]:
                del self._accounts[name]

    def served(self, client: str, took_s: float) -> None:
        """The device worked for a client."""
        self._served_s += took_s
        self._accounts[client].used_s += took_s
        competing = [
            account.used_s
            for account in self._accounts.values()
            if account.jobs or self._served_s - account.left_s < ABSENCE_S
        ]
        self._level_s = max(self._level_s, min(competing))

    def lead_s(self, client: str) -> float:
        """Seconds that a client has had more than the least-served one that competes."""
        return max(0.0, self._accounts[client].used_s - self._level_s)
