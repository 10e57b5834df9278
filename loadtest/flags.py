"""Values of these programs' command lines, checked before anything is loaded.

Each is a ``type`` for argparse, which tells what is wrong. Programs that tests import, as parts
of a package, look for this file only where they are run.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Sequence

from fluxcore.params import MAX_SIDE_PX, MIN_SIDE_PX, SIZE_MULTIPLE


def assignment(text: str) -> str:
    """``NAME=VALUE``, a setting of the service. Values are checked where they are used."""
    from app.settings import Settings

    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")  # as the command takes it
    if not equals:
        raise ArgumentTypeError(f"must be NAME=VALUE; got {text!r}")
    if name not in Settings.model_fields:
        raise ArgumentTypeError(f"{name!r} is no setting; 'fluxd settings' lists them")
    return f"{name}={value}"


def as_settings(assignments: Sequence[str]) -> dict[str, str]:
    """Such assignments by name; the last one of a name counts."""
    return dict(one.split("=", 1) for one in assignments)


def count(text: str) -> int:
    """How often, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a number from 1 on; got {text!r}")
    return int(text)


def side_px(text: str) -> int:
    """Width and height of a picture, in pixels."""
    is_side = text.isdecimal() and MIN_SIDE_PX <= int(text) <= MAX_SIDE_PX
    if not is_side or int(text) % SIZE_MULTIPLE:
        raise ArgumentTypeError(
            f"must be a multiple of {SIZE_MULTIPLE} from {MIN_SIDE_PX} to {MAX_SIDE_PX}; "
            f"got {text!r}"
        )
    return int(text)


def seconds(text: str) -> float:
    """A time, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"must be seconds, 0 or more; got {text!r}")
    return value
