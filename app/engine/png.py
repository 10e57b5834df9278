"""RGB pictures to PNG files, fast: one filter for each strip of rows, strips side by side.

Owns the compression and the file; ``fluxcore.residues`` or the device filters. Pillow tries all
five filters on every row and then looks for repetitions that pictures do not have; here a strip
takes the filter that leaves the smallest residues, and zlib-ng only looks for runs and gives
frequent values short codes. That is a fraction of the work for smaller files, and strips can be
made on any thread. A device that compresses by itself leaves only the file to be put together.
What is in the file depends on the picture, and on whether a device compressed it.

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

from fluxcore.drawn import DeflatedLines
from fluxcore.residues import ADLER_MODULUS, CHANNELS, Bytes2D, filtered, strip_height

Buffer = bytes | memoryview
Map = Callable[[Callable[["Strip"], "Deflated"], Iterable["Strip"]], Iterable["Deflated"]]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# "Deflate, 32 KiB window, fastest level", and a checksum of these two bytes.
ZLIB_HEADER = b"\x78\x01"


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
    deflated: DeflatedLines | None = None,
) -> bytes:
    """A PNG file of an RGB picture.

    Shapes: picture [height, width, 3], where it is an array; lines [height, 1 + 3 width].

    Args:
        texts: (type, data) of the chunks that stand before the picture.
        spread: maps strips to results in their order; ``Executor.map`` does it on threads.
        lines: the picture's, where it was filtered before.
        deflated: its lines, where they were compressed before.
    """
    pixels = np.asarray(picture)
    height, width, channels = pixels.shape
    assert channels == CHANNELS and pixels.dtype == np.uint8, "RGB pictures of 8 bits only"
    stride = width * CHANNELS
    assert lines is None or lines.shape == (height, 1 + stride), "lines of this picture"
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [*_chunk(b"IHDR", head), *(part for text in texts for part in _chunk(*text))]
    if deflated is not None:
        data, adler = deflated
        chunks += _chunk(b"IDAT", ZLIB_HEADER, data.data, struct.pack(">I", adler))
    else:
        count = strip_height(height, stride)
        parts = filtered(pixels.reshape(height, stride), count) if lines is None else (lines,)
        chunks += _compressed(spread(_deflate, _strips(parts, count, height)))
    return b"".join((SIGNATURE, *chunks, *_chunk(b"IEND")))


def _compressed(strips: Iterable[Deflated]) -> Iterator[Buffer]:
    """The chunks of a picture's strips, as they come."""
    adler, opening = 1, ZLIB_HEADER
    for data, length, of_strip in strips:
        yield from _chunk(b"IDAT", opening, data)
        adler, opening = _joined(adler, of_strip, length), b""
    yield from _chunk(b"IDAT", struct.pack(">I", adler))


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


def _chunk(kind: bytes, *data: Buffer) -> Iterator[Buffer]:
    """A chunk in parts, which are copied once, into the file."""
    checksum = zlib.crc32(kind)
    for part in data:
        checksum = zlib.crc32(part, checksum)
    yield struct.pack(">I", sum(map(len, data))) + kind
    yield from data
    yield struct.pack(">I", checksum)
