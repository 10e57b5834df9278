"""How much of a model stays on the device, chosen from the memory that there is.

Owns the three ways and the choice between them. Knows nothing of checkpoints: what each
way needs is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fluxcore.errors import DeviceUnavailableError

Residency = Literal["resident", "balanced", "low"]
"""``resident``: all weights stay. ``balanced``: those of the text encoder come when a prompt
is new, layer by layer, and leave at once. ``low``: so do the transformer's, in every step."""

WAYS: tuple[Residency, ...] = get_args(Residency)
USABLE = 0.9
"""Share of the memory found that is counted on; the rest is other programs' to grow into."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which way was taken, and why.

    Attributes:
        reason: one line for the log.
        is_tight: not everything stays, or not even the least way fits.
    """

    residency: Residency
    reason: str
    is_tight: bool


def choose_residency(asked: str, needs: Mapping[Residency, int], found_bytes: int) -> Choice:
    """The first way that fits, or the one that was asked for.

    Args:
        asked: ``auto`` or one of the ways.
        needs: bytes on the device that each way takes, work included.
        found_bytes: bytes there that are free.

    Raises:
        DeviceUnavailableError: there is no such way.
    """
    if asked not in ("auto", *WAYS):
        raise DeviceUnavailableError(f"residency must be auto, {', '.join(WAYS)}; got {asked!r}")
    figures = ", ".join(f"{way} {_gb(needs[way])}" for way in WAYS)
    counted = int(found_bytes * USABLE)
    fitting = [way for way in WAYS if needs[way] <= counted]
    fits = f"{_gb(found_bytes)} of memory are free, {_gb(counted)} counted on; needed: {figures}"
    if asked == "auto":
        chosen = fitting[0] if fitting else WAYS[-1]
        reason = f"residency {chosen}: {fits}"
        if not fitting:
            reason += "; even that does not fit: use a smaller model or free memory"
        return Choice(chosen, reason, is_tight=chosen != "resident" or not fitting)
    chosen = next(way for way in WAYS if way == asked)
    return Choice(chosen, f"residency {chosen}, as asked: {fits}", is_tight=chosen not in fitting)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
