"""Sixel pictures: foot, xterm, mlterm, Windows Terminal and others.

Source: VT330/VT340 Programmer Reference Manual, volume 2, chapter 14.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

MAX_COLOURS = 256
BAND_ROWS = 6
# The six pixels of a column are the bits of one character, counted from this one.
FIRST_CHARACTER = 63
# Longer runs are written as a count.
_RUN = re.compile(rb"(.)\1{3,}", re.DOTALL)


def encode(picture: Image.Image, colours: int = MAX_COLOURS) -> bytes:
    """Show a picture pixel by pixel, from the cursor on, in at most so many colours."""
    reduced = picture.convert("RGB").quantize(
        max(2, min(colours, MAX_COLOURS)),
        method=Image.Quantize.MEDIANCUT,
        dither=Image.Dither.FLOYDSTEINBERG,
    )
    used = len(reduced.getcolors() or ())
    palette = np.array((reduced.getpalette() or [])[: 3 * used], dtype=np.float64).reshape(-1, 3)
    percent = np.rint(palette * 100 / 255).astype(int)
    parts = [b'\x1bP0;1;0q"1;1;%d;%d' % picture.size]
    parts += [b"#%d;2;%d;%d;%d" % (i, *rgb) for i, rgb in enumerate(percent.tolist())]
    pixels = np.asarray(reduced, dtype=np.uint8)
    for top in range(0, pixels.shape[0], BAND_ROWS):
        parts.append(_band(pixels[top : top + BAND_ROWS]))
    return b"".join(parts) + b"\x1b\\"


def _band(pixels: np.ndarray) -> bytes:
    """Six rows: for each colour in them, the line is written once over the others."""
    present = np.unique(pixels)
    weights = (1 << np.arange(pixels.shape[0], dtype=np.uint8))[None, :, None]
    is_of = pixels[None] == present[:, None, None]
    bits = (is_of * weights).sum(axis=1).astype(np.uint8) + np.uint8(FIRST_CHARACTER)
    lines = [
        b"#%d" % colour + _RUN.sub(_counted, row.tobytes().rstrip(b"?"))
        for colour, row in zip(present.tolist(), bits, strict=True)
    ]
    return b"$".join(lines) + b"-"


def _counted(run: re.Match[bytes]) -> bytes:
    return b"!%d%s" % (len(run[0]), run[1])
