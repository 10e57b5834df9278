"""Width and height of ``/v1/generate``, in each of the ways in which they may be given.

Owns which ways go together, and what a shape and an area come to. Whether a side is one that the
model draws is checked by ``GenerationParams``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Protocol

from app.api.documents import RATIO_PATTERN
from app.errors import InvalidRequestError
from app.settings import Settings, parse_size
from fluxcore.params import MAX_SIDE_PX, MIN_SIDE_PX, SIZE_MULTIPLE

MAX_MEGAPIXELS = MAX_SIDE_PX**2 / 1e6
_RATIO = re.compile(RATIO_PATTERN)


class WithSides(Protocol):
    """The fields of a request that tell its size. Units: pixels, but for ``megapixels``."""

    @property
    def width(self) -> int | None: ...
    @property
    def height(self) -> int | None: ...
    @property
    def size(self) -> str | None: ...
    @property
    def aspect_ratio(self) -> str | None: ...
    @property
    def megapixels(self) -> float | None: ...


def sides_of(
    asked: WithSides, settings: Settings, own_side_px: Callable[[], int]
) -> dict[str, int]:
    """Width and height as far as they are given, whichever way; in pixels.

    Args:
        own_side_px: tells the loaded model's default width and height.

    Raises:
        InvalidRequestError: naming the field.
        ServiceError: what is asked depends on a model that is not loaded.
    """
    ways = {
        "width": asked.width,
        "height": asked.height,
        "size": asked.size,
        "aspect_ratio": asked.aspect_ratio,
    }
    given = {name: value for name, value in ways.items() if value is not None}
    if asked.megapixels is not None and asked.aspect_ratio is None:
        raise InvalidRequestError("megapixels needs aspect_ratio beside it", param="megapixels")
    if len(given) > 1 and not given.keys() <= {"width", "height"}:
        first, second = list(given)[-2:]
        raise InvalidRequestError(
            f"{second} does not go with {first}: give width and height, size, or aspect_ratio",
            param=second,
        )
    if asked.size is not None:
        return _from_size(asked.size)
    if asked.aspect_ratio is not None:
        return _from_ratio(asked.aspect_ratio, asked.megapixels, settings, own_side_px)
    return {
        name: value for name in ("width", "height") if (value := getattr(asked, name)) is not None
    }


def _from_size(size: str) -> dict[str, int]:
    if size == "auto":
        return {}
    try:
        width, height = parse_size(size)
    except ValueError as error:
        raise InvalidRequestError(f"size: {error}", param="size") from None
    return {"width": width, "height": height}


def _from_ratio(
    ratio: str, megapixels: float | None, settings: Settings, own_side_px: Callable[[], int]
) -> dict[str, int]:
    """The multiples of 16 nearest to a shape and an area."""
    match = _RATIO.fullmatch(ratio)
    if match is None or not float(match[1]) or not float(match[2]):
        raise InvalidRequestError(
            f"aspect_ratio is written WIDTH:HEIGHT, such as 16:9; got {ratio!r:.60}",
            param="aspect_ratio",
        )
    if megapixels is not None and not 0 < megapixels <= MAX_MEGAPIXELS:
        raise InvalidRequestError(
            f"megapixels must be above 0 to {MAX_MEGAPIXELS:g}; got {megapixels:g}",
            param="megapixels",
        )
    if megapixels is not None:
        area = megapixels * 1e6
    else:
        area = float(
            (settings.default_width or own_side_px()) * (settings.default_height or own_side_px())
        )
    width = math.sqrt(area * float(match[1]) / float(match[2]))
    sides = {"width": _rounded(width), "height": _rounded(area / width)}
    if not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX for side in sides.values()):
        raise InvalidRequestError(
            f"aspect_ratio {ratio} of {area / 1e6:.3g} megapixels is {sides['width']}x"
            f"{sides['height']}; each side must be from {MIN_SIDE_PX} to {MAX_SIDE_PX}",
            param="aspect_ratio",
        )
    return sides


def _rounded(side: float) -> int:
    return round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE
