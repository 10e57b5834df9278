"""Pictures of a request: files, base64 or data URLs to PIL.

Owns the transport encoding and which field an error names; the bytes themselves
are judged by ``app.engine.pictures``.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from app.api.bodies import Source
from app.engine.pictures import PictureError, read_mask, read_picture
from app.errors import InvalidRequestError
from fluxcore.fitting import limit_area

_DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# The patterns look at so much of the text; they must not run over megabytes of base64.
HEAD_CHARS = 256


@dataclass(frozen=True, slots=True)
class InputPictures:
    """The decoded pictures of one request."""

    references: tuple[Image.Image, ...]
    mask: Image.Image | None


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What one picture may have: bytes of its file, and pixels."""

    max_bytes: int
    max_pixels: int


def decode_pictures(
    references: Sequence[Source],
    mask: Source | None,
    limits: PictureLimits,
    name: str = "images",
) -> InputPictures:
    """Decode all pictures of a request. Slow: call it off the event loop.

    Args:
        name: what the request calls its references; ``{name}[1]`` is the second.

    Raises:
        InvalidRequestError: naming the picture that cannot be used.
    """
    pictures = []
    for i, source in enumerate(references):
        picture = _decode(f"{name}[{i}]", source, limits, read_picture)
        # A waiting job holds no more pixels than the model will see. The one under a mask
        # keeps its size, which the mask's must equal.
        painted = i == 0 and mask is not None
        pictures.append(picture if painted else limit_area(picture))
    return InputPictures(
        references=tuple(pictures),
        mask=None if mask is None else _decode("mask", mask, limits, read_mask),
    )


def _decode(
    param: str,
    source: Source,
    limits: PictureLimits,
    read: Callable[[bytes, int], Image.Image],
) -> Image.Image:
    try:
        data = source if isinstance(source, bytes) else _from_base64(source)
        if len(data) > limits.max_bytes:
            raise PictureError(f"has {len(data)} bytes; at most {limits.max_bytes} are allowed")
        return read(data, limits.max_pixels)
    except PictureError as error:
        raise InvalidRequestError(f"{param} {error}", param=param) from None


def _from_base64(text: str) -> bytes:
    """Strictly decoded; line breaks are allowed, as ``base64`` programs write them."""
    if _REMOTE.match(text[:HEAD_CHARS]):
        raise PictureError("is an address; addresses are not fetched, send the picture as base64")
    header = _DATA_URL.match(text[:HEAD_CHARS])
    if header is not None:
        if ";base64" not in header[2].lower():
            raise PictureError("must be a data URL in base64: data:image/png;base64,...")
        text = text[header.end() :]
    try:
        data = text.encode("ascii").translate(None, b"\r\n")
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        raise PictureError(
            "is not valid base64; send base64 with its padding, or a data URL"
        ) from None
