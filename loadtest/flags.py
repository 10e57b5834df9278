"""Values of these programs' command lines, checked before anything is loaded.

Each is a ``type`` for argparse, which tells what is wrong.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence

from fluxcore.params import SIZE_MULTIPLE


def assignment(text: str) -> str:
    """``NAME=VALUE``, a setting of the service."""
    if "=" not in text:
        raise ArgumentTypeError(f"must be NAME=VALUE; got {text!r}")
    return text


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
    if not text.isdecimal() or int(text) < 1 or int(text) % SIZE_MULTIPLE:
        raise ArgumentTypeError(f"must be a multiple of {SIZE_MULTIPLE}; got {text!r}")
    return int(text)
