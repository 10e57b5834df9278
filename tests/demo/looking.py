"""What stands where in a picture, told from its pixels alone.

Written apart from the pictures' generator on purpose: these are the colours that a
person means, and a place is where a person would point.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

NAMED = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 50),
    "orange": (245, 140, 30),
    "purple": (130, 50, 170),
    "pink": (250, 150, 190),
    "brown": (125, 75, 40),
    "black": (20, 20, 20),
    "grey": (135, 135, 135),
    "white": (250, 250, 250),
    "cyan": (50, 200, 210),
}
CORNERS = ((0.04, 0.04), (0.96, 0.04), (0.04, 0.96), (0.96, 0.96))


def colour_at(picture: Image.Image, x: float, y: float) -> str:
    """The name of the colour around a point; x and y are shares of width and height."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)
    height, width = pixels.shape[:2]
    row, column = round(y * (height - 1)), round(x * (width - 1))
    reach = max(2, min(width, height) // 64)
    around = pixels[
        max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1
    ]
    middle = np.median(around.reshape(-1, 3), axis=0)
    return min(NAMED, key=lambda name: float(np.square(middle - NAMED[name]).sum()))


def colours_at(picture: Image.Image, *points: tuple[float, float]) -> list[str]:
    return [colour_at(picture, x, y) for x, y in points]


def corners(picture: Image.Image) -> set[str]:
    """The colours of the four corners; one, where the background is plain."""
    return set(colours_at(picture, *CORNERS))


def share_of(picture: Image.Image, name: str) -> float:
    """How much of the picture is nearest to a named colour."""
    pixels = np.asarray(picture.convert("RGB")).astype(float)[:, :, None]  # [h, w, 1, 3]
    palette = np.array(list(NAMED.values()), dtype=float)  # [colours, 3]
    nearest = np.square(pixels - palette).sum(-1).argmin(-1)
    return float((nearest == list(NAMED).index(name)).mean())


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of the 8-bit values."""
    assert a.size == b.size
    one, two = (np.asarray(p.convert("RGB")).astype(float) for p in (a, b))
    return float(np.abs(one - two).mean())
