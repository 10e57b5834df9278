"""A finished picture on the host, as it came from the device.

Owns what a picture is handed on as, so that nobody makes an image of it who needs none. Needs
no torch, so that whoever writes files can use it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class DeflatedLines(NamedTuple):
    """A picture's lines as one DEFLATE stream, and the checksum of what was compressed.

    Shapes: data [bytes].
    """

    data: NDArray[np.uint8]
    adler: int


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    """Pixels, and what the device made of them.

    From CUDA all of it lies in pinned memory, which is held for as long as the picture is.

    Attributes:
        pixels: RGB. Shapes: [height, width, 3].
        lines: the same as a PNG file has them, equal to those of ``fluxcore.residues``; None where
            the device does not filter, or has compressed them. Shapes: [height, 1 + 3 width].
        deflated: the lines, compressed; None where the device does not, or not well.
    """

    pixels: NDArray[np.uint8]
    lines: NDArray[np.uint8] | None = None
    deflated: DeflatedLines | None = None

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[0])

    @cached_property
    def image(self) -> Image.Image:
        """For PIL; a copy that is made when it is first asked for."""
        return Image.fromarray(self.pixels)
