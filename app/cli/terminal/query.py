"""Asking a terminal what it is and what it can.

Every terminal answers the last question, its device attributes, and answers in order:
once that answer is there, what is missing will not come.

Source: XTerm Control Sequences (DA1, XTVERSION, XTSMGRAPHICS, XTWINOPS 16, DSR 6);
the kitty graphics protocol, "Querying support".
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# A line to the other side of the world and a busy terminal at its end.
TIMEOUT_S = 1.5
# One pixel that is only checked, never shown; the answer bears its number.
IS_KITTY = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"
NAME_AND_CELL = b"\x1b[>0q\x1b[16t"
ATTRIBUTES = b"\x1b[c"
HOW_MANY_COLOURS = b"\x1b[?1;1;0S"
WHERE_IS_THE_CURSOR = b"\x1b[6n"
SIXEL_ATTRIBUTE = b"4"

_ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
_NAME = re.compile(rb"\x1bP>\|([^\x1b\x07]*)(?:\x1b\\|\x07)")
_CELL = re.compile(rb"\x1b\[6;(\d+);(\d+)t")
_COLOURS = re.compile(rb"\x1b\[\?1;0;(\d+)S")
_KITTY = re.compile(rb"\x1b_Gi=31;OK\x1b\\")
_CURSOR = re.compile(rb"\x1b\[(\d+);(\d+)R")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a terminal said of itself.

    Attributes:
        has_answered: it said anything at all.
        name: its name and version; None where it keeps that to itself.
        cell_px: width and height of a character cell.
        colours: how many a sixel picture may have.
    """

    has_answered: bool = False
    name: str | None = None
    has_kitty: bool = False
    has_sixel: bool = False
    cell_px: tuple[int, int] | None = None
    colours: int | None = None

    @classmethod
    def parse(cls, said: bytes) -> Answers:
        """From the bytes that came back."""
        attributes = _ATTRIBUTES.search(said)
        name = _NAME.search(said)
        cell = _CELL.search(said)
        colours = _COLOURS.search(said)
        size = None if cell is None else (int(cell[2]), int(cell[1]))
        return cls(
            has_answered=attributes is not None,
            name=None if name is None else name[1].decode("utf-8", "replace"),
            has_kitty=_KITTY.search(said) is not None,
            has_sixel=attributes is not None and SIXEL_ATTRIBUTE in attributes[1].split(b";"),
            cell_px=size if size and min(size) > 0 else None,
            colours=None if colours is None or not int(colours[1]) else int(colours[1]),
        )


def ask_terminal(*, is_multiplexed: bool = False, timeout_s: float = TIMEOUT_S) -> Answers:
    """Ask the terminal of this process. Without one, or without an answer, all is unknown.

    Args:
        is_multiplexed: it is tmux or screen, which take the first question for a title.
    """
    question = (b"" if is_multiplexed else IS_KITTY) + NAME_AND_CELL
    said = _asked(question + ATTRIBUTES, _ATTRIBUTES, timeout_s)
    if Answers.parse(said).has_sixel:
        # Asked of these only: others write of it into their logs.
        said += _asked(HOW_MANY_COLOURS + ATTRIBUTES, _ATTRIBUTES, timeout_s)
    return Answers.parse(said)


def cursor_place(timeout_s: float = TIMEOUT_S) -> tuple[int, int] | None:
    """Row and column of the cursor, from 1; None where the terminal does not tell."""
    found = _CURSOR.search(_asked(WHERE_IS_THE_CURSOR, _CURSOR, timeout_s))
    return None if found is None else (int(found[1]), int(found[2]))


def _asked(question: bytes, end: re.Pattern[bytes], timeout_s: float) -> bytes:
    """What came back, up to what ``end`` matches."""
    said = b""
    try:
        with _opened() as terminal:
            os.write(terminal, question)
            deadline_s = time.monotonic() + timeout_s
            while end.search(said) is None:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not select.select([terminal], [], [], left_s)[0]:
                    break
                part = os.read(terminal, 4096)
                if not part:
                    break
                said += part
    except (OSError, ImportError):
        # No terminal belongs to this process, or none that can be asked.
        return b""
    return said


@contextmanager
def _opened() -> Iterator[int]:
    """The terminal itself, whatever the standard streams are; it echoes nothing meanwhile."""
    import termios
    import tty

    terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    try:
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal, termios.TCSADRAIN)
            yield terminal
        finally:
            # What comes late must not end up on the next command line.
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
    except termios.error as error:
        raise OSError(*error.args) from None
    finally:
        os.close(terminal)
