"""Pictures out of coloured characters, for terminals that show no others.

A cell is the upper half block: its own colour above, the background's below.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

UPPER_HALF = "▀"
# Steps of the colour cube in the palette of 256 colours (xterm's).
_CUBE = (0, 95, 135, 175, 215, 255)
_CUBE_START = 16


def encode(picture: Image.Image, columns: int, rows: int, *, has_true_colour: bool) -> bytes:
    """Show a picture over so many cells, from the cursor on."""
    small = picture.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    pixels = np.asarray(small).tolist()
    lines = []
    for row in range(rows):
        cells = []
        before = ""
        for column in range(columns):
            above, below = pixels[2 * row][column], pixels[2 * row + 1][column]
            colours = _colours(above, below, has_true_colour)
            cells.append(UPPER_HALF if colours == before else f"{colours}{UPPER_HALF}")
            before = colours
        lines.append("".join(cells))
    return (f"\x1b[{columns}D\x1b[1B".join(lines) + "\x1b[0m").encode()


def _colours(above: list[int], below: list[int], has_true_colour: bool) -> str:
    if has_true_colour:
        return "\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*above, *below)
    return f"\x1b[38;5;{_nearest(above)};48;5;{_nearest(below)}m"


def _nearest(colour: list[int]) -> int:
    """The nearest colour of the cube."""
    red, green, blue = (
        min(range(len(_CUBE)), key=lambda i: abs(_CUBE[i] - value)) for value in colour
    )
    return _CUBE_START + 36 * red + 6 * green + blue
