"""RGB pictures to PNG files, fast: one filter for each strip of rows, strips side by side.

Owns the compression and the file; ``fluxcore.residues`` or the device filters. Pillow tries all
five filters on every row and then looks for repetitions that pictures do not have; here a strip
takes the filter that leaves the smallest residues, and zlib-ng only looks for runs and gives
frequent values short codes. That is a fraction of the work for smaller files, and strips can be
made on any thread. What is in the file depends on the picture alone, not on the machine.

Source: PNG specification, third edition, 10 (compression); RFC 1950 and 1951, whose blocks may
be made apart and joined at byte boundaries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from zlib_ng import zlib_ng as zlib

from fluxcore.residues import CHANNELS, Bytes2D, filtered, strip_height

Map = Callable[[Callable[["Strip"], "Deflated"], Iterable["Strip"]], Iterable["Deflated"]]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# "Deflate, 32 KiB window, fastest level", and a checksum of these two bytes.
ZLIB_HEADER = b"\x78\x01"
ADLER_MODULUS = 65521


class Strip(NamedTuple):
    """Rows that lie together, filtered. Shapes: lines [height, 1 + 3 width], the filter first."""

    lines: Bytes2D
    is_last: bool


class Deflated(NamedTuple):
    """A strip, compressed; length and checksum are of what was compressed."""

    data: bytes
    length: int
    adler: int


def write_png(
    picture: Image.Image | NDArray[np.uint8],
    texts: Sequence[tuple[bytes, bytes]],
    spread: Map = map,
    lines: Bytes2D | None = None,
) -> bytes:
    """A PNG file of an RGB picture.

    Shapes: picture [height, width, 3], where it is an array; lines [height, 1 + 3 width].

    Args:
        texts: (type, data) of the chunks that stand before the picture.
        spread: maps strips to results in their order; ``Executor.map`` does it on threads.
        lines: the picture's, where it was filtered before.
    """
    pixels = np.asarray(picture)
    height, width, channels = pixels.shape
    assert channels == CHANNELS and pixels.dtype == np.uint8, "RGB pictures of 8 bits only"
    stride = width * CHANNELS
    assert lines is None or lines.shape == (height, 1 + stride), "lines of this picture"
    count = strip_height(height, stride)
    parts = filtered(pixels.reshape(height, stride), count) if lines is None else (lines,)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [SIGNATURE, _chunk(b"IHDR", head), *(_chunk(kind, data) for kind, data in texts)]
    adler, opening = 1, ZLIB_HEADER
    for deflated in spread(_deflate, _strips(parts, count, height)):
        chunks.append(_chunk(b"IDAT", opening + deflated.data))
        adler, opening = _joined(adler, deflated.adler, deflated.length), b""
    chunks += [_chunk(b"IDAT", struct.pack(">I", adler)), _chunk(b"IEND", b"")]
    return b"".join(chunks)


def _strips(parts: Iterable[Bytes2D], count: int, height: int) -> Iterator[Strip]:
    """Filtered rows, ``count`` at a time, as they come."""
    done = 0
    for lines in parts:
        for start in range(0, len(lines), count):
            strip = lines[start : start + count]
            done += len(strip)
            yield Strip(strip, is_last=done == height)


def _deflate(strip: Strip) -> Deflated:
    compressor = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    packed = compressor.compress(strip.lines)
    packed += compressor.flush(zlib.Z_FINISH if strip.is_last else zlib.Z_SYNC_FLUSH)
    return Deflated(packed, strip.lines.size, zlib.adler32(strip.lines))


def _joined(first: int, second: int, second_length: int) -> int:
    """The Adler-32 of two pieces of data from those of each (RFC 1950, section 9)."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + second_length * ((first & 0xFFFF) - 1)
    return high % ADLER_MODULUS << 16 | low % ADLER_MODULUS


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))
