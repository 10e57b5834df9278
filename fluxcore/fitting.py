"""How large a reference is given to the model. PIL only, so that a front end can use it too.

Source: diffusers Flux2ImageProcessor._resize_to_target_area.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fluxcore.params import SIZE_MULTIPLE

if TYPE_CHECKING:
    from PIL import Image

LARGEST_REFERENCE_AREA = 1024 * 1024


def limit_area(picture: Image.Image) -> Image.Image:
    """At most 1024 x 1024 pixels in area; doing it twice changes nothing."""
    from PIL.Image import Resampling

    size = _area_limited(picture.size)
    return picture if size == picture.size else picture.resize(size, Resampling.LANCZOS)


def whole_tokens(picture: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels, rounded down to multiples of 16."""
    return _whole(picture.size)


def fitted_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) that a picture is fitted to, in pixels, without touching the pixels."""
    return _whole(_area_limited(picture.size))


def _area_limited(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width * height <= LARGEST_REFERENCE_AREA:
        return size
    scale = math.sqrt(LARGEST_REFERENCE_AREA / (width * height))
    return int(width * scale), int(height * scale)


def _whole(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // SIZE_MULTIPLE * SIZE_MULTIPLE, size[1] // SIZE_MULTIPLE * SIZE_MULTIPLE
