"""Each way of showing pictures: its bytes, read back to pixels, are the picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cli.terminal import kitty, screen
from app.cli.terminal.detect import Found, Graphics
from app.cli.terminal.screen import Screen, Terminal
from tests.service.terminal.emulator import Emulator, placeholders

CELL = (10, 20)


class Output(io.TextIOWrapper):
    """What the terminal is sent; no terminal itself, so 80 x 24 cells are taken."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")

    def bytes(self) -> bytes:
        """All of it so far, once."""
        self.flush()
        data = self.buffer.getvalue()  # type: ignore[attr-defined]
        self.buffer.seek(0)
        self.buffer.truncate()
        return data  # type: ignore[no-any-return]


def colours(width: int = 200, height: int = 320, seed: int = 0) -> Image.Image:
    """Squares of colours that even sixel's percents tell exactly."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 6, (height // 20, width // 20, 3), dtype=np.uint8) * 51
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def shown_on(graphics: Graphics, **given: object) -> tuple[Screen, Output]:
    found = Found(graphics, **given)  # type: ignore[arg-type]
    output = Output()
    return Screen(output, Terminal(found, CELL)), output


def same(shown: Image.Image, picture: Image.Image) -> bool:
    cut = shown.convert("RGBA").crop((0, 0, *picture.size))
    return cut.convert("RGB").tobytes() == picture.tobytes() and cut.getchannel(
        "A"
    ).getextrema() == (255, 255)


@pytest.mark.parametrize("graphics", [Graphics.KITTY, Graphics.ITERM2, Graphics.SIXEL])
@pytest.mark.parametrize("size", [(200, 320), (203, 337), (64, 400)])
def test_a_picture_that_fits_is_shown_pixel_by_pixel(
    graphics: Graphics, size: tuple[int, int]
) -> None:
    picture = colours(400, 400).crop((0, 0, *size))
    target, output = shown_on(graphics)
    target.show(picture)
    terminal = Emulator()
    terminal.feed(b"above\r\n" + output.bytes() + b"below")
    (placed,) = terminal.placed
    columns, rows = -(-size[0] // CELL[0]), -(-size[1] // CELL[1])
    assert (placed.row, placed.column) == (1, 0)
    assert same(placed.picture, picture)
    assert terminal.line(0) == "above" and terminal.line(1 + rows) == "below"
    if graphics is not Graphics.SIXEL:
        # The file fills the cells that it is stretched over: nothing is distorted.
        assert (placed.columns, placed.rows) == (columns, rows)
        assert placed.picture.size == (columns * CELL[0], rows * CELL[1])


@pytest.mark.parametrize("graphics", [Graphics.KITTY, Graphics.ITERM2, Graphics.SIXEL])
def test_many_colours_are_near_enough(graphics: Graphics) -> None:
    ramp = Image.linear_gradient("L").resize((240, 330))
    picture = Image.merge(
        "RGB", (ramp, ramp.rotate(180), ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    )
    target, output = shown_on(graphics)
    target.show(picture)
    terminal = Emulator()
    terminal.feed(output.bytes())
    shown = terminal.placed[0].picture.convert("RGB").crop((0, 0, *picture.size))
    off = np.abs(np.asarray(shown, dtype=int) - np.asarray(picture, dtype=int)).mean()
    # Measured: 0 and 1.6 of 255.
    assert off <= (4 if graphics is Graphics.SIXEL else 0)


@pytest.mark.parametrize("graphics", [*Graphics])
def test_a_picture_that_is_too_large_keeps_its_shape_and_fits(graphics: Graphics) -> None:
    target, output = shown_on(graphics)
    shown = target.show(colours(2000, 1000))
    assert shown is not None
    assert shown.columns <= 79 and shown.rows <= 24 - screen.FREE_ROWS
    assert shown.width_px / shown.height_px == pytest.approx(2, rel=0.01)
    Emulator().feed(output.bytes())


def test_a_tiny_picture_is_enlarged() -> None:
    target, _ = shown_on(Graphics.KITTY)
    shown = target.show(colours(60, 60))
    assert shown is not None and shown.rows == screen.LEAST_ROWS


@pytest.mark.parametrize("graphics", [Graphics.KITTY, Graphics.ITERM2, Graphics.SIXEL])
def test_frames_take_each_others_place_even_at_the_lower_end(graphics: Graphics) -> None:
    frames = [colours(seed=seed) for seed in range(3)]
    target, output = shown_on(graphics)
    terminal = Emulator()
    terminal.feed(b"\r\n" * 40 + b"above\r\n")
    shown = None
    for frame in frames:
        shown = target.show(frame, shown)
        terminal.feed(output.bytes())
    terminal.feed(b"below")
    assert {placed.row for placed in terminal.placed} == {41}
    assert same(terminal.placed[-1].picture, frames[-1])
    assert terminal.line(40) == "above" and terminal.line(41 + 16) == "below"
    if graphics is Graphics.KITTY:
        # The terminal holds one picture, not three over one another.
        assert len(terminal.placed) == 1
    target.show(colours(seed=9))
    terminal.feed(output.bytes())
    assert terminal.placed[-1].row == 41 + 16


def test_kitty_puts_pictures_where_characters_stand_for_them() -> None:
    picture = colours()
    target, output = shown_on(Graphics.KITTY, is_wrapped=True, has_placeholders=True)
    outer = Emulator()
    inner = Emulator(outer=outer)
    inner.feed(b"above\r\n" + output.bytes())
    first = target.show(picture)
    second = target.show(colours(seed=1))
    inner.feed(output.bytes() + b"below")
    assert first is not None and second is not None and first.number != second.number
    found = placeholders(inner, "".join(kitty.DIACRITICS))
    assert list(found) == [kitty.image_id(first.number), kitty.image_id(second.number)]
    for top, shown, drawn in ((1, first, picture), (17, second, colours(seed=1))):
        identity = kitty.image_id(shown.number)
        grid = {(top + row, column, row, column) for row in range(16) for column in range(20)}
        assert found[identity] == grid
        columns, rows, sent = outer.virtual[identity]
        assert (columns, rows) == (20, 16) and same(sent, drawn)
    assert inner.line(33) == "below"


def test_the_marks_of_rows_are_those_of_the_protocol() -> None:
    # Of the list that the protocol refers to (rowcolumn-diacritics.txt).
    known = {0: 0x305, 1: 0x30D, 3: 0x310, 16: 0x35B, 17: 0x363, 30: 0x483, 35: 0x592, 54: 0x610}
    known |= {62: 0x657, 69: 0x6D6, 85: 0x730}
    assert {place: ord(kitty.DIACRITICS[place]) for place in known} == known


def test_ids_are_told_by_a_colour_that_exists_and_one_mark() -> None:
    ids = [kitty.image_id(number) for number in range(kitty.MAX_NUMBER)]
    assert len(set(ids)) == len(ids)
    assert all(1 <= identity & 0xFF <= 255 and not identity & 0xFFFF00 for identity in ids)
    assert max(ids) >> 24 < len(kitty.DIACRITICS)


def test_through_tmux_pictures_go_to_their_place_on_the_whole_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pane begins at row 5 and column 30 of the terminal around it."""
    monkeypatch.setattr(screen, "cursor_place", lambda: (3, 1))
    monkeypatch.setattr(screen, "pane_origin", lambda environment: (5, 30))
    outer = Emulator(120, 40)
    inner = Emulator(outer=outer)
    for graphics in (Graphics.KITTY, Graphics.ITERM2, Graphics.SIXEL):
        picture = colours()
        target, output = shown_on(graphics, is_wrapped=True)
        target.show(picture)
        inner.feed(output.bytes())
        placed = outer.placed[-1]
        assert (placed.row, placed.column) == (2 + 5, 30)
        assert same(placed.picture, picture)


def test_what_tmux_would_throw_away_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "cursor_place", lambda: (1, 1))
    monkeypatch.setattr(screen, "pane_origin", lambda environment: (0, 0))
    monkeypatch.setattr(screen, "MAX_SEQUENCE_BYTES", 60_000)
    noise = Image.effect_noise((300, 300), 90).convert("RGB")
    outer = Emulator(120, 40)
    target, output = shown_on(Graphics.ITERM2, is_wrapped=True)
    target.show(noise)
    sent = output.bytes()
    assert len(sent) < 61_000
    Emulator(outer=outer).feed(sent)
    (placed,) = outer.placed
    assert placed.picture.width < 300 and (placed.columns, placed.rows) == (32, 16)


@pytest.mark.parametrize("has_true_colour", [True, False])
def test_blocks_show_two_pixels_in_a_cell(has_true_colour: bool) -> None:
    picture = Image.new("RGB", (200, 320), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 160, 200, 320))
    picture.paste((0, 255, 0), (0, 170, 200, 180))
    output = Output()
    found = Found(Graphics.BLOCKS)
    Screen(output, Terminal(found, CELL, has_true_colour=has_true_colour)).show(picture)
    terminal = Emulator()
    terminal.feed(output.bytes() + b"below")
    red, blue, green = (
        ((255, 0, 0), (0, 0, 255), (0, 255, 0)) if has_true_colour else ((196,), (21,), (46,))
    )
    for row in range(16):
        cell = terminal.cells[row, 19]
        above, below = (red, red) if row < 8 else (blue, blue)
        assert (cell.text, cell.foreground) == ("▀", above)
        assert cell.background == (green if row == 8 else below)
    assert terminal.line(16) == "below"
    assert terminal.cells[16, 0].background == ()


def test_where_nothing_can_be_shown_nothing_is_written() -> None:
    output = Output()
    assert Screen(output, Terminal(Found(None))).show(colours()) is None
    assert output.bytes() == b""


def test_a_file_of_sixels_can_be_made_without_a_terminal(tmp_path: Path) -> None:
    """``--graphics sixel > file`` names the form, so that nobody needs to be asked."""
    named = screen.open_screen("sixel", {"TERM": "dumb"})
    assert named.graphics is Graphics.SIXEL and named.is_standard_output
