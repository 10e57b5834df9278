"""Rows of a picture as a PNG file has them: what the pixels differ by from a filter's prediction.

Owns the strips that rows are taken in, the choice of each strip's filter and the filters, on the
host, and what is added up of lines to know them again. A strip takes the filter that leaves the
smallest residues in some of its rows. ``fluxcore.pipeline.pictures`` does the same on a device
and gives the same bytes. Knows nothing of compression, nor of torch.

Source: PNG specification, third edition, 9.2 (filters); RFC 1950, 9 (Adler-32).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bytes2D = NDArray[np.uint8]

CHANNELS = 3
# What one thread compresses at a time, of a picture of 256x256, and how many strips that makes.
# Larger strips keep fewer threads busy; smaller ones cost bytes, and time to hand over. So strips
# grow with the picture's side: 4 at 256x256, 8 at 512x512, 16 at 1024x1024.
STRIP_BYTES, STRIPS = 48 * 2**10, 4
# Strips that are filtered together: each step is a call that costs more than its work on little.
BAND_STRIPS = 4
# One row in so many is looked at for the choice of the filter. Not row 0: the picture's own has
# nothing above it.
SAMPLED = 8
LOOKED_AT = slice(SAMPLED // 2, None, SAMPLED)
SUB, UP, AVERAGE = 1, 2, 3
# Of those that leave equally little, the first is taken.
FILTERS = (SUB, UP, AVERAGE)
ADLER_MODULUS = 65521


def adler_of(count: int, total: int, weighted: int) -> int:
    """The Adler-32 of so many bytes.

    Args:
        total: the sum of all of them.
        weighted: the sum of each times how many there are from it on.
    """
    return (count + weighted) % ADLER_MODULUS << 16 | (1 + total) % ADLER_MODULUS


def strip_height(height: int, stride: int) -> int:
    """Rows of each strip but the last, which may have fewer; a multiple of ``SAMPLED``.

    Args:
        stride: bytes of a row, without the filter.
    """
    of_strip = STRIP_BYTES * max(1.0, math.sqrt(height * stride / (STRIPS * STRIP_BYTES)))
    return max(1, int(of_strip) // stride // SAMPLED) * SAMPLED


def filtered(rows: Bytes2D, count: int) -> Iterator[Bytes2D]:
    """All rows, some strips at a time: they can be compressed while others are filtered.

    They are filtered on one thread. The steps are so short that several threads, each of which
    lets go of the interpreter's lock in every step, would wait for one another.

    Shapes: rows [height, 3 width] -> several [part of height, 1 + 3 width], the filter first.

    Args:
        count: rows of a strip.
    """
    height = len(rows)
    for top in range(0, height, count * BAND_STRIPS):
        yield _band(rows, top, min(height, top + count * BAND_STRIPS), count)


def _band(rows: Bytes2D, top: int, bottom: int, count: int) -> Bytes2D:
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
    sample, before, above = current[LOOKED_AT], left[LOOKED_AT], up[LOOKED_AT]
    if not len(sample):
        return iter(())
    predicted = np.empty((len(FILTERS), *sample.shape), np.uint8)  # [filter, rows, 3 width]
    predicted[0], predicted[1], predicted[2] = before, above, _mean(before, above)
    residues = sample - predicted
    left_over = np.minimum(residues, 0 - residues).sum(axis=2, dtype=np.int64)  # [filter, rows]
    firsts = range(0, len(sample), count // SAMPLED)
    best: list[int] = np.add.reduceat(left_over, firsts, axis=1).argmin(axis=0).tolist()
    return iter([FILTERS[i] for i in best])


def _mean(first: Bytes2D, second: Bytes2D) -> Bytes2D:
    """Of two bytes, rounded down, without a wider type."""
    mean = first ^ second
    mean >>= 1
    mean += first & second
    return mean
