"""The kitty graphics protocol: Kitty, Ghostty, Konsole and others.

Source: https://sw.kovidgoyal.net/kitty/graphics-protocol/ ("Remote client", "Display
images on screen", "Unicode placeholders").
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterator

from app.cli.terminal.tmux import wrapped

CHUNK_BYTES = 4096
PLACEHOLDER = "\U0010eeee"
# Characters that the protocol leaves out of the rule below: they may be joined with the
# letter before them.
_JOINED = frozenset(
    "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u0309\u030a\u030b\u030c\u030f\u0311\u0313\u0314"
    "\u0342\u0653\u0654"
)
# Up to here the rule gives the same in every version of Unicode since 6.0, which it is for.
_LAST_OF_RULE = 0x82D
# Row, column and highest byte of the number are told by the place in this list.
DIACRITICS = tuple(
    mark
    for mark in map(chr, range(0x300, _LAST_OF_RULE + 1))
    if mark not in _JOINED
    and unicodedata.combining(mark) == 230
    and not unicodedata.decomposition(mark)
)
MAX_ROWS = len(DIACRITICS)
# The lowest byte is told by one of 256 colours, which even tmux keeps as it is.
_LOW_NUMBERS = 255
MAX_NUMBER = _LOW_NUMBERS * (MAX_ROWS - 1)


def encode(png: bytes, columns: int, rows: int, number: int) -> bytes:
    """Show a picture over so many cells, from the cursor on, which stays.

    Args:
        number: names the picture; one that is shown again takes the place of the first.
    """
    control = f"a=T,f=100,t=d,i={image_id(number)},p=1,c={columns},r={rows},C=1,q=2"
    return b"".join(_chunks(png, control))


def encode_for_tmux(png: bytes, columns: int, rows: int, number: int) -> bytes:
    """The same inside tmux: characters that stand for the picture and move with the text."""
    identity = image_id(number)
    control = f"a=T,f=100,t=d,i={identity},U=1,c={columns},r={rows},q=2"
    high, low = identity >> 24, identity & 0xFF
    lines = []
    for row in range(rows):
        # Cells without marks go on where their left neighbour stands.
        first = PLACEHOLDER + DIACRITICS[row] + DIACRITICS[0] + DIACRITICS[high]
        lines.append(first + PLACEHOLDER * (columns - 1))
    # The cursor is put below each line's first cell; it is on the first line at the start.
    text = f"\x1b[{columns}D\x1b[1B".join(lines)
    shown = f"\x1b[38;5;{low}m{text}\x1b[39m".encode()
    return b"".join(map(wrapped, _chunks(png, control))) + shown


def image_id(number: int) -> int:
    """A number as the protocol's: its lowest and its highest byte tell it."""
    high, low = divmod(number % MAX_NUMBER, _LOW_NUMBERS)
    return (high << 24) | (low + 1)


def _chunks(png: bytes, control: str) -> Iterator[bytes]:
    data = base64.b64encode(png)
    parts = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    for index, part in enumerate(parts):
        more = int(index < len(parts) - 1)
        keys = f"{control},m={more}" if index == 0 else f"m={more},q=2"
        yield b"\x1b_G" + keys.encode() + b";" + part + b"\x1b\\"
