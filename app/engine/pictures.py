"""Input pictures: bytes of a client to PIL, with nothing trusted.

Owns sniffing, the pixel limit, orientation, transparency and the meaning of a
mask. Knows nothing of how the bytes arrived.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, ImageOps, UnidentifiedImageError

from app.engine.picture_files import CostlyFileError, check_cost

FORMATS = ("PNG", "JPEG", "WEBP")
# At and above this, a grey mask without transparency says "draw again".
MASK_WHITE = 128

# What Pillow's readers raise for bytes that are not a sound picture.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class PictureError(Exception):
    """The bytes are not a picture that can be used; the message says why, without a subject."""


def read_picture(data: bytes, max_pixels: int) -> Image.Image:
    """Bytes to an upright RGB picture, transparency shown on white.

    Raises:
        PictureError: another format, too many pixels, scans or parts, animated, truncated
            or corrupt.
    """
    return _read(data, max_pixels, _to_rgb)


def read_mask(data: bytes, max_pixels: int) -> Image.Image:
    """Bytes to an upright 8-bit mask in which 255 is drawn again and 0 stays.

    Where the file has transparency, fully transparent pixels are drawn again
    (the OpenAI convention) and its colours do not count; otherwise white ones are.

    Raises:
        PictureError: as for ``read_picture``, or nothing is marked.
    """
    return _read(data, max_pixels, _to_mask)


def _read(
    data: bytes, max_pixels: int, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """Decode within the limits, turn upright and convert, which looks at parts of the file, too."""
    if not data:
        raise PictureError("is empty")
    try:
        check_cost(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_header(opened, max_pixels)
            opened.load()
            return convert(ImageOps.exif_transpose(opened))
    except CostlyFileError as error:
        raise PictureError(str(error)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"has more than {max_pixels} pixels, the most allowed") from None
    except UnidentifiedImageError:
        raise PictureError("is not a PNG, JPEG or WebP picture") from None
    except DECODE_ERRORS:
        raise PictureError("is truncated or corrupt") from None


def _check_header(opened: Image.Image, max_pixels: int) -> None:
    """Look at the header only; no pixel has been decoded yet."""
    if opened.width * opened.height > max_pixels:
        raise PictureError(
            f"has {opened.width}x{opened.height} pixels; at most {max_pixels} are allowed"
        )
    # A JPEG of several pictures (a phone's depth or gain map) is read as its first.
    if opened.format in ("PNG", "WEBP") and getattr(opened, "is_animated", False):
        raise PictureError("is animated; send a single frame")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if _has_alpha(picture):
        layered = picture.convert("RGBA")
        page = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(page, layered).convert("RGB")
    return _eight_bit(picture).convert("RGB")


def _to_mask(picture: Image.Image) -> Image.Image:
    if _has_alpha(picture):
        alpha = picture.convert("RGBA").getchannel("A")
        mask = alpha.point([255] + [0] * 255)
        rule = "transparent (alpha 0)"
    else:
        grey = _eight_bit(picture).convert("L")
        mask = grey.point([0] * MASK_WHITE + [255] * (256 - MASK_WHITE))
        rule = "white"
    if mask.getbbox() is None:
        raise PictureError(f"marks nothing to draw again; make those parts {rule}")
    return mask


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would cut it off at 255."""
    if picture.mode.startswith("I"):
        return picture.point(lambda value: value * (1 / 256)).convert("L")
    return picture
