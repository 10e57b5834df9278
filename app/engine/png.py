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

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from zlib_ng import zlib_ng as zlib

Bytes2D = NDArray[np.uint8]
Map = Callable[[Callable[["Strip"], "Deflated"], Iterable["Strip"]], Iterable["Deflated"]]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = 3
# What one thread compresses at a time, of a picture of 256x256, and how many strips that makes.
# Larger strips keep fewer threads busy; smaller ones cost bytes, and time to hand over. So strips
# grow with the picture's side: 4 at 256x256, 8 at 512x512, 16 at 1024x1024.
STRIP_BYTES, STRIPS = 48 * 2**10, 4
# Strips that are filtered together: each step is a call that costs more than its work on little.
BAND_STRIPS = 4
# One row in so many is looked at for the choice of the filter.
SAMPLED = 8
SUB, UP, AVERAGE = 1, 2, 3
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


def _strips(rows: Bytes2D) -> Iterator[Strip]:
    """All strips, one after the other: the first can be compressed while others are filtered.

    They are filtered on one thread. The steps are so short that several threads, each of which
    lets go of the interpreter's lock in every step, would wait for one another.
    """
    height, stride = rows.shape
    of_strip = STRIP_BYTES * max(1.0, math.sqrt(rows.size / (STRIPS * STRIP_BYTES)))
    count = max(1, int(of_strip) // stride // SAMPLED) * SAMPLED
    for top in range(0, height, count * BAND_STRIPS):
        lines = _filtered(rows, top, min(height, top + count * BAND_STRIPS), count)
        for start in range(0, len(lines), count):
            strip = lines[start : start + count]
            yield Strip(strip, is_last=top + start + len(strip) == height)


def _filtered(rows: Bytes2D, top: int, bottom: int, count: int) -> Bytes2D:
    """Some rows filtered, ``count`` at a time by what leaves the least of them.

    Shapes: rows [height, 3 width] -> [bottom - top, 1 + 3 width].
    """
    current = rows[top:bottom]
    height, stride = current.shape
    # With what stands to the left of each row and above all, which is 0 outside of the picture.
    framed = np.empty((1 + height, CHANNELS + stride), np.uint8)
    framed[:, :CHANNELS] = 0
    framed[0, CHANNELS:] = rows[top - 1] if top else 0
    framed[1:, CHANNELS:] = current
    left, up = framed[1:, :stride], framed[:-1, CHANNELS:]
    kinds = _best_filters(current, left, up, count)
    lines = np.empty((height, 1 + stride), np.uint8)
    for start in range(0, height, count):
        # Of the fewer rows than are looked at of a picture's end nothing is known.
        kind = next(kinds, SUB)
        part = slice(start, start + count)
        predicted = left[part] if kind == SUB else up[part]
        if kind == AVERAGE:
            predicted = _mean(left[part], predicted)
        lines[part, 0] = kind
        np.subtract(current[part], predicted, out=lines[part, 1:])
    return lines


def _best_filters(current: Bytes2D, left: Bytes2D, up: Bytes2D, count: int) -> Iterator[int]:
    """For each ``count`` rows the filter that leaves the least, by the sum of absolute residues."""
    # Not from row 0: the picture's own has nothing above it.
    looked_at = slice(SAMPLED // 2, None, SAMPLED)
    sample, before, above = current[looked_at], left[looked_at], up[looked_at]
    if not len(sample):
        return iter(())
    predicted = np.empty((3, *sample.shape), np.uint8)  # [filter, rows, 3 width]
    predicted[0], predicted[1], predicted[2] = before, above, _mean(before, above)
    residues = sample - predicted
    left_over = np.minimum(residues, 0 - residues).sum(axis=2, dtype=np.int64)  # [filter, rows]
    firsts = range(0, len(sample), count // SAMPLED)
    best: list[int] = np.add.reduceat(left_over, firsts, axis=1).argmin(axis=0).tolist()
    return iter([(SUB, UP, AVERAGE)[i] for i in best])


def _mean(first: Bytes2D, second: Bytes2D) -> Bytes2D:
    """Of two bytes, rounded down, without a wider type."""
    mean = first ^ second
    mean >>= 1
    mean += first & second
    return mean


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
