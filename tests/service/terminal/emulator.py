"""A terminal that knows cells, a cursor and the three ways of showing pictures.

Written from the protocols' descriptions, not from the code that it reads the output of.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from dataclasses import dataclass

from PIL import Image

ESCAPE = "\x1b"
_TOKEN = re.compile(
    rb"\x1b_G(?P<kitty>[^\x1b]*)\x1b\\"
    rb"|\x1b\]1337;File=(?P<iterm2>[^\x07]*)\x07"
    rb"|\x1bPtmux;(?P<tmux>(?:\x1b\x1b|[^\x1b])*)\x1b\\"
    rb"|\x1bP(?P<sixel>[^\x1b]*)\x1b\\"
    rb"|\x1b\[(?P<csi>[\d;?]*)(?P<final>[A-Za-z])"
    rb"|\x1b(?P<cursor>[78])"
    rb"|(?P<control>[\r\n])"
    rb"|(?P<text>[^\x1b\r\n]+)",
    re.DOTALL,
)
PLACEHOLDER = "\U0010eeee"


@dataclass(frozen=True)
class Placed:
    """A picture: where its upper left corner is, and the cells that it covers."""

    row: int
    column: int
    columns: int
    rows: int
    picture: Image.Image


@dataclass
class Cell:
    text: str
    foreground: tuple[int, ...]
    background: tuple[int, ...]


class Emulator:
    """Rows count from the first line ever written, so that they outlive scrolling.

    Args:
        outer: the terminal that wrapped sequences go to, where this one is tmux.
    """

    def __init__(self, columns: int = 80, rows: int = 24, outer: Emulator | None = None) -> None:
        self.columns, self.rows = columns, rows
        self.row = self.column = self.top = 0
        self.cells: dict[tuple[int, int], Cell] = {}
        self.placed: list[Placed] = []
        self.virtual: dict[int, tuple[int, int, Image.Image]] = {}
        self._by_id: dict[int, Placed] = {}
        self._saved = (0, 0)
        self._chunks = b""
        self._keys: dict[str, str] = {}
        self._colours: dict[str, tuple[int, ...]] = {"38": (), "48": ()}
        self._outer = outer

    def feed(self, data: bytes) -> None:
        """Take output; what is not understood is an error."""
        at = 0
        while at < len(data):
            token = _TOKEN.match(data, at)
            assert token is not None, data[at : at + 40]
            at = token.end()
            kind = token.lastgroup
            match "csi" if kind == "final" else kind:
                case "kitty":
                    self._kitty(token["kitty"])
                case "iterm2":
                    self._iterm2(token["iterm2"])
                case "tmux":
                    assert self._outer is not None, "wrapped for tmux, outside of it"
                    self._outer.feed(token["tmux"].replace(b"\x1b\x1b", b"\x1b"))
                case "sixel":
                    self._place(decode_sixel(token["sixel"]), None, None)
                case "csi":
                    self._csi(token["csi"].decode(), token["final"].decode())
                case "cursor":
                    self._save_or_restore(token["cursor"])
                case "control":
                    self._control(token["control"])
                case "text":
                    self._text(token["text"].decode())

    def line(self, row: int) -> str:
        """The characters of one row."""
        found = [self.cells.get((row, column)) for column in range(self.columns)]
        return "".join(" " if cell is None else cell.text[0] for cell in found).rstrip()

    def _control(self, which: bytes) -> None:
        self.column = 0
        if which == b"\n":
            self.row += 1
            self.top = max(self.top, self.row - self.rows + 1)

    def _csi(self, arguments: str, final: str) -> None:
        numbers = [int(one) if one.isdigit() else 1 for one in arguments.split(";")]
        match final:
            case "A":
                self.row = max(self.top, self.row - numbers[0])
            case "B":
                self.row = min(self.top + self.rows - 1, self.row + numbers[0])
            case "D":
                self.column = max(0, self.column - numbers[0])
            case "H":
                self.row, self.column = self.top + numbers[0] - 1, numbers[1] - 1
            case "K":
                first = 0 if arguments == "2" else self.column
                for column in range(first, self.columns):
                    self.cells.pop((self.row, column), None)
            case "h" | "l":
                # The cursor is shown and hidden.
                assert arguments == "?25"
            case "m":
                self._paint(arguments.split(";"))
            case _:
                raise AssertionError((arguments, final))

    def _paint(self, codes: list[str]) -> None:
        while codes:
            code = codes.pop(0)
            if code in ("38", "48"):
                count = 3 if codes.pop(0) == "2" else 1
                self._colours[code] = tuple(int(codes.pop(0)) for _ in range(count))
            elif code in ("39", "0", ""):
                self._colours = {"38": (), "48": () if code != "39" else self._colours["48"]}

    def _save_or_restore(self, which: bytes) -> None:
        if which == b"7":
            self._saved = (self.row, self.column)
        else:
            self.row, self.column = self._saved

    def _text(self, text: str) -> None:
        for character in text:
            if unicodedata.combining(character):
                self.cells[self.row, self.column - 1].text += character
                continue
            if self.column == self.columns:
                self._control(b"\n")
            self.cells[self.row, self.column] = Cell(
                character, self._colours["38"], self._colours["48"]
            )
            self.column += 1

    def _kitty(self, body: bytes) -> None:
        control, _, data = body.partition(b";")
        keys = dict(pair.split("=") for pair in control.decode().split(","))
        assert len(data) <= 4096
        if not self._keys:
            self._keys = keys
        else:
            assert keys.keys() <= {"m", "q"}, "only the first chunk has keys"
        self._chunks += data
        if keys.get("m") == "1":
            assert len(data) % 4 == 0
            return
        first, self._keys = self._keys, {}
        data, self._chunks = base64.b64decode(self._chunks, validate=True), b""
        assert (first["a"], first["f"], first["q"]) == ("T", "100", "2")
        picture = _png(data)
        columns, rows, identity = int(first["c"]), int(first["r"]), int(first["i"])
        if first.get("U") == "1":
            self.virtual[identity] = (columns, rows, picture)
            return
        assert first["C"] == "1"
        before = self._by_id.pop(identity, None)
        if before is not None:
            self.placed.remove(before)
        self._place(picture, columns, rows)
        self._by_id[identity] = self.placed[-1]

    def _iterm2(self, body: bytes) -> None:
        arguments, _, data = body.partition(b":")
        keys = dict(pair.split("=") for pair in arguments.decode().split(";"))
        file = base64.b64decode(data, validate=True)
        assert keys["inline"] == "1" and int(keys["size"]) == len(file)
        self._place(_png(file), int(keys["width"]), int(keys["height"]))

    def _place(self, picture: Image.Image, columns: int | None, rows: int | None) -> None:
        assert self.row + (rows or 0) <= self.top + self.rows, "a picture below the last row"
        self.placed.append(Placed(self.row, self.column, columns or 0, rows or 0, picture))


def placeholders(terminal: Emulator, marks: str) -> dict[int, set[tuple[int, int, int, int]]]:
    """Cells that stand for pictures: by the picture's id, (row, column, its row, its column).

    Args:
        marks: the characters that tell numbers, in their order.
    """
    found: dict[int, set[tuple[int, int, int, int]]] = {}
    left: tuple[int, int, int] | None = None
    for (row, column), cell in sorted(terminal.cells.items()):
        if cell.text[0] != PLACEHOLDER:
            left = None
            continue
        numbers = [marks.index(mark) for mark in cell.text[1:]]
        if numbers:
            of_row, of_column, high = numbers
        else:
            assert left is not None
            of_row, of_column, high = left[0], left[1] + 1, left[2]
        left = (of_row, of_column, high)
        identity = (high << 24) | cell.foreground[0]
        found.setdefault(identity, set()).add((row, column, of_row, of_column))
    return found


def decode_sixel(body: bytes) -> Image.Image:
    """A sixel picture's pixels; what no colour touched is transparent."""
    parameters, q, data = body.partition(b"q")
    assert q and parameters == b"0;1;0"
    size = re.match(rb'"1;1;(\d+);(\d+)', data)
    assert size is not None
    picture = Image.new("RGBA", (int(size[1]), int(size[2])))
    pixels = picture.load()
    palette: dict[int, tuple[int, int, int, int]] = {}
    column = top = 0
    colour = (0, 0, 0, 0)
    pattern = rb"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])"
    at = size.end()
    while at < len(data):
        token = re.compile(pattern).match(data, at)
        assert token is not None, data[at : at + 20]
        at = token.end()
        if token[1]:
            rgb = tuple(round(int(part) * 255 / 100) for part in token.group(2, 3, 4))
            palette[int(token[1])] = (*rgb, 255)  # type: ignore[assignment]
        elif token[5]:
            colour = palette[int(token[5])]
        elif token[9]:
            column = 0
            top += 6 if token[9] == b"-" else 0
        else:
            count, sign = (int(token[6]), token[7]) if token[6] else (1, token[8])
            set_bits = [bit for bit in range(6) if (sign[0] - 63) >> bit & 1]
            for across in range(column, column + count):
                for bit in set_bits:
                    pixels[across, top + bit] = colour
            column += count
    return picture


def _png(file: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    assert picture.format == "PNG"
    picture.load()
    return picture
