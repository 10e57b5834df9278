"""RGB pictures to PNG files, fast: one filter for each strip of rows, strips side by side.

Owns the choice of filter and the compression. Pillow tries all five filters on every row
and then looks for repetitions that pictures do not have; here a strip takes the filter that
leaves the smallest residues, and zlib-ng only looks for runs and gives frequent values short
codes. That is a fraction of the work for smaller files, and strips can be made on any thread.
What is in the file depends on the picture alone, not on the machine.

Source: PNG specification, third edition, 9.2 (filters) and 10 (compression); RFC 1950 and
1951, whose blocks may be made apart and joined at byte boundaries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from zlib_ng import zlib_ng as zlib

Bytes2D = NDArray[np.uint8]
Map = Callable[[Callable[["Strip"], "Deflated"], Iterable["Strip"]], Iterable["Deflated"]]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = 3
# Larger ones keep fewer threads busy, smaller ones cost bytes.
STRIP_BYTES = 2**18
# One row in so many is looked at for the choice of the filter.
SAMPLED = 8
SUB, UP, AVERAGE = 1, 2, 3
# "Deflate, 32 KiB window, fastest level", and a checksum of these two bytes.
ZLIB_HEADER = b"\x78\x01"
ADLER_MODULUS = 65521


class Strip(NamedTuple):
    """Rows that lie together. Shapes: rows [height, 3 width], above [3 width]."""

    rows: Bytes2D
    above: Bytes2D
    is_last: bool


class Deflated(NamedTuple):
    """A strip, filtered and compressed; length and checksum are of what was compressed."""

    data: bytes
    length: int
    adler: int


def write_png(
    picture: Image.Image, texts: Sequence[tuple[bytes, bytes]], spread: Map = map
) -> bytes:
    """A PNG file of an RGB picture.

    Args:
        texts: (type, data) of the chunks that stand before the picture.
        spread: maps strips to results in their order; ``Executor.map`` does it on threads.
    """
    assert picture.mode == "RGB", f"RGB pictures only; got {picture.mode}"
    pixels = np.asarray(picture)  # [height, width, 3]
    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [SIGNATURE, _chunk(b"IHDR", head), *(_chunk(kind, data) for kind, data in texts)]
    adler, opening = 1, ZLIB_HEADER
    for deflated in spread(_deflate, _strips(pixels.reshape(height, width * CHANNELS))):
        chunks.append(_chunk(b"IDAT", opening + deflated.data))
        adler, opening = _joined(adler, deflated.adler, deflated.length), b""
    chunks += [_chunk(b"IDAT", struct.pack(">I", adler)), _chunk(b"IEND", b"")]
    return b"".join(chunks)


def _strips(rows: Bytes2D) -> Iterable[Strip]:
    height, stride = rows.shape
    count = max(1, STRIP_BYTES // stride)
    above = np.zeros(stride, np.uint8)
    for top in range(0, height, count):
        strip = rows[top : top + count]
        yield Strip(strip, above, is_last=top + count >= height)
        above = strip[-1]


def _deflate(strip: Strip) -> Deflated:
    kind, residues = _filtered(strip)
    lines = np.empty((residues.shape[0], 1 + residues.shape[1]), np.uint8)
    lines[:, 0] = kind
    lines[:, 1:] = residues
    data = lines.tobytes()
    compressor = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    packed = compressor.compress(data)
    packed += compressor.flush(zlib.Z_FINISH if strip.is_last else zlib.Z_SYNC_FLUSH)
    return Deflated(packed, len(data), zlib.adler32(data))


def _filtered(strip: Strip) -> tuple[int, Bytes2D]:
    """The filter that leaves the least, by the sum of absolute residues, and what it leaves."""
    rows = strip.rows
    left = np.zeros_like(rows)
    left[:, CHANNELS:] = rows[:, :-CHANNELS]
    up = np.concatenate((strip.above[None], rows[:-1]))
    # The mean of two bytes, rounded down, without a wider type.
    predicted = {SUB: left, UP: up, AVERAGE: (left & up) + ((left ^ up) >> 1)}
    # Not from row 0: the picture's own has nothing above it.
    looked_at = slice(min(SAMPLED // 2, len(rows) - 1), None, SAMPLED)

    def left_over(kind: int) -> int:
        residues = rows[looked_at] - predicted[kind][looked_at]
        return int(np.minimum(residues, 0 - residues).sum(dtype=np.int64))

    kind = min(predicted, key=left_over)
    return kind, rows - predicted[kind]


def _joined(first: int, second: int, second_length: int) -> int:
    """The Adler-32 of two pieces of data from those of each (RFC 1950, section 9)."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + second_length * ((first & 0xFFFF) - 1)
    return high % ADLER_MODULUS << 16 | low % ADLER_MODULUS


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)))
