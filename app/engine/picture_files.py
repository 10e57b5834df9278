"""What a picture's file would cost to decode, told from its parts without decoding any.

A limit on pixels is not enough: a JPEG of 100 KB can hold hundreds of scans, each of
which visits every pixel again, and a file of any format can be millions of empty parts.
Real files have few of either.
"""

from __future__ import annotations

import re

# Encoders write up to 20 scans. 25 million pixels take some 40 ms a scan.
MAX_SCANS = 64
# Segments of a JPEG or chunks of a PNG; some 5 us each in Pillow.
MAX_PARTS = 20_000

_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Markers that have no length after them.
_TEM, _SOI, _EOI, _SOS = 0x01, 0xD8, 0xD9, 0xDA


class CostlyFileError(Exception):
    """Decoding would take far longer than the picture's size tells; the message says why."""


def check_cost(data: bytes) -> None:
    """Walk through the file's parts. What is no sound file is left to the decoder.

    Raises:
        CostlyFileError: too many scans or parts.
    """
    if data.startswith(_PNG_START):
        _check_png(data)
    elif data.startswith(_JPEG_START):
        _check_jpeg(data)


def _check_png(data: bytes) -> None:
    position = len(_PNG_START)
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            return
        # Length, type, content, checksum.
        position += 12 + int.from_bytes(data[position : position + 4])
    raise CostlyFileError(f"has more than {MAX_PARTS} chunks")


def _check_jpeg(data: bytes) -> None:
    position, scans = len(_JPEG_START), 0
    for _ in range(MAX_PARTS):
        # Skips the entropy-coded data of a scan, too.
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            return
        marker, position = data[found.start() + 1], found.end()
        if marker == _EOI:
            return
        if marker in (_TEM, _SOI):
            continue
        if marker == _SOS:
            scans += 1
            if scans > MAX_SCANS:
                raise CostlyFileError(f"has more than {MAX_SCANS} scans; save it as a plain JPEG")
        position += int.from_bytes(data[position : position + 2])
    raise CostlyFileError(f"has more than {MAX_PARTS} segments")
