"""A picture's place on the terminal: its size in cells, and frames over one another.

Whatever the way of showing, the rows are made first, so that nothing scrolls under the
picture, and the cursor ends on the line below it.
"""

from __future__ import annotations

import io
import math
import os
import random
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TextIO

from PIL import Image

from app.cli.console import UsageError
from app.cli.terminal import blocks, iterm2, kitty, sixel
from app.cli.terminal.detect import (
    AUTO,
    GRAPHICS_NAMES,
    Found,
    Graphics,
    as_named,
    can_be_asked,
    choose,
    is_multiplexed,
)
from app.cli.terminal.query import Answers, ask_terminal, cursor_place
from app.cli.terminal.tmux import MAX_SEQUENCE_BYTES, Tmux, at_place, find_tmux, pane_origin

USUAL_CELL_PX = (10, 20)
# Rows that stay free for the lines below a picture.
FREE_ROWS = 3
# A picture with fewer rows is enlarged to so many, if they are there.
LEAST_ROWS = 16
# By how much a picture is made smaller until tmux takes it.
SHRINK = 0.7
# Speed counts more than bytes.
PNG_COMPRESS_LEVEL = 1


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture on the terminal.

    Attributes:
        width_px, height_px: its size there, from its place's upper left corner on.
        number: the terminal's name for it.
    """

    columns: int
    rows: int
    width_px: int
    height_px: int
    number: int


@dataclass(frozen=True, slots=True)
class Terminal:
    """What is known of the terminal.

    Attributes:
        cell_px: width and height of a character cell.
        colours: how many a sixel picture may have.
    """

    found: Found
    cell_px: tuple[int, int] = USUAL_CELL_PX
    colours: int = sixel.MAX_COLOURS
    has_true_colour: bool = True


class Screen:
    """Shows pictures on a terminal, one below the other.

    Args:
        out: what is written to it.
    """

    def __init__(self, out: TextIO, terminal: Terminal) -> None:
        self._out = out
        self._terminal = terminal
        self._next_number = random.randrange(kitty.MAX_NUMBER)

    @property
    def note(self) -> str | None:
        """What the person could change to see more."""
        return self._terminal.found.note

    @property
    def graphics(self) -> Graphics | None:
        """How pictures are shown; None if they are not."""
        return self._terminal.found.graphics

    @property
    def is_standard_output(self) -> bool:
        """Whether what is shown goes where a program's result goes."""
        return self._out is sys.stdout

    def show(self, picture: Image.Image, over: Shown | None = None) -> Shown | None:
        """Show a picture below what is there, or over the one that was shown last.

        Args:
            over: that one. The cursor must stand on the line below it.
        """
        if self.graphics is None:
            return None
        place = self._place(picture)
        if over is not None and (over.columns, over.rows) == (place.columns, place.rows):
            place = replace(place, number=over.number)
            self._write(b"\r\x1b[%dA" % place.rows)
        else:
            self._next_number += 1
            self._write(b"\r" + b"\n" * place.rows + b"\x1b[%dA" % place.rows)
        self._write(b"\x1b7" + self._sequence(picture, place) + b"\x1b8")
        self._write(b"\x1b[%dB\r" % place.rows)
        return place

    def _place(self, picture: Image.Image) -> Shown:
        """How large it gets: its own size, more where that is tiny, less where it must."""
        width, height = picture.size
        cell_width, cell_height = self._terminal.cell_px
        screen_columns, screen_rows = self._size()
        most_rows = max(1, min(screen_rows - FREE_ROWS, kitty.MAX_ROWS))
        # The last column is left alone: some terminals go to the next line behind it.
        largest = min(
            max(1, screen_columns - 1) * cell_width / width, most_rows * cell_height / height
        )
        scale = min(largest, max(1.0, LEAST_ROWS * cell_height / height))
        width_px, height_px = max(1, round(width * scale)), max(1, round(height * scale))
        return Shown(
            columns=math.ceil(width_px / cell_width),
            rows=math.ceil(height_px / cell_height),
            width_px=width_px,
            height_px=height_px,
            number=self._next_number,
        )

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._out.fileno())
        except (OSError, io.UnsupportedOperation):
            return 80, 24
        return size.columns or 80, size.lines or 24

    def _sequence(self, picture: Image.Image, place: Shown) -> bytes:
        found = self._terminal.found
        if found.has_placeholders:
            png = self._png(picture, place, 1.0)
            return kitty.encode_for_tmux(png, place.columns, place.rows, place.number)
        sequence, scale = self._plain(picture, place, 1.0), 1.0
        if not found.is_wrapped:
            return sequence
        while len(sequence) > MAX_SEQUENCE_BYTES:
            scale *= SHRINK
            sequence = self._plain(picture, place, scale)
        return self._through_tmux(sequence)

    def _plain(self, picture: Image.Image, place: Shown, scale: float) -> bytes:
        """The picture in the terminal's own way, of so many of its pixels."""
        columns, rows = place.columns, place.rows
        match self.graphics:
            case Graphics.KITTY:
                png = self._png(picture, place, scale)
                return kitty.encode(png, columns, rows, place.number)
            case Graphics.ITERM2:
                return iterm2.encode(self._png(picture, place, scale), columns, rows)
            case Graphics.SIXEL:
                fitted = _resized(picture, place.width_px * scale, place.height_px * scale)
                return sixel.encode(fitted, self._terminal.colours)
        has_true_colour = self._terminal.has_true_colour
        return blocks.encode(picture, columns, rows, has_true_colour=has_true_colour)

    def _png(self, picture: Image.Image, place: Shown, scale: float) -> bytes:
        """A file that fills whole cells, so that no terminal stretches the picture."""
        fitted = _resized(picture, place.width_px * scale, place.height_px * scale)
        cell_width, cell_height = self._terminal.cell_px
        size = (
            round(place.columns * cell_width * scale),
            round(place.rows * cell_height * scale),
        )
        if fitted.size != size:
            page = Image.new("RGBA", size)
            page.paste(fitted, (0, 0))
            fitted = page
        target = io.BytesIO()
        fitted.save(target, "PNG", compress_level=PNG_COMPRESS_LEVEL)
        return target.getvalue()

    def _through_tmux(self, sequence: bytes) -> bytes:
        """To the terminal around tmux, at the place where tmux believes the cursor to be."""
        self._out.flush()
        cursor, origin = cursor_place(), pane_origin(os.environ)
        if cursor is None or origin is None:
            return b""
        return at_place(sequence, cursor[0] + origin[0], cursor[1] + origin[1])

    def _write(self, data: bytes) -> None:
        self._out.flush()
        self._out.buffer.write(data)
        self._out.buffer.flush()


def open_screen(graphics: str, environment: Mapping[str, str] | None = None) -> Screen:
    """The terminal of this process, to show pictures on.

    Args:
        graphics: one of ``GRAPHICS_NAMES``; ``auto`` finds out.
        environment: the process's own when left out.

    Raises:
        UsageError: there is no terminal, or no such way of showing.
    """
    if graphics not in GRAPHICS_NAMES:
        raise UsageError(f"--graphics takes {', '.join(GRAPHICS_NAMES)}; got {graphics!r}")
    environment = os.environ if environment is None else environment
    out = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if out is None and graphics == AUTO:
        raise UsageError(
            "there is no terminal to show pictures on; leave --show out, or name the form with "
            f"--graphics {', '.join(Graphics)}"
        )
    answers = Answers()
    if out is not None and can_be_asked(environment):
        answers = ask_terminal(is_multiplexed=is_multiplexed(environment))
    tmux = None if out is None else find_tmux(environment)
    found = choose(environment, answers, tmux)
    if graphics != AUTO:
        found = as_named(Graphics(graphics), found, tmux)
    return Screen(
        out or sys.stdout,
        Terminal(
            found=found,
            cell_px=_cell_px(out, answers, tmux),
            colours=answers.colours or sixel.MAX_COLOURS,
            has_true_colour=_has_true_colour(environment),
        ),
    )


def _cell_px(out: TextIO | None, answers: Answers, tmux: Tmux | None) -> tuple[int, int]:
    """Width and height of a cell, from whoever knows it."""
    if tmux is not None and tmux.cell_px is not None:
        return tmux.cell_px
    if answers.cell_px is not None:
        return answers.cell_px
    return USUAL_CELL_PX if out is None else _cell_by_kernel(out) or USUAL_CELL_PX


def _cell_by_kernel(out: TextIO) -> tuple[int, int] | None:
    try:
        import fcntl
        import termios
    except ImportError:
        return None
    try:
        told = fcntl.ioctl(out.fileno(), termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return None
    rows, columns, width, height = struct.unpack("HHHH", told)
    if not all((rows, columns, width, height)):
        return None
    return max(1, width // columns), max(1, height // rows)


def _has_true_colour(environment: Mapping[str, str]) -> bool:
    return (
        environment.get("COLORTERM") in ("truecolor", "24bit")
        or environment.get("TERM", "").endswith("-direct")
        # It reduces colours itself where the terminal around it has fewer.
        or bool(environment.get("TMUX"))
    )


def _resized(picture: Image.Image, width_px: float, height_px: float) -> Image.Image:
    size = (max(1, round(width_px)), max(1, round(height_px)))
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.LANCZOS)
