"""The pictures of a session, by number. They are in memory until they are saved."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from app.cli.prompt.parsing import LAST, LineError
from app.engine.pictures import PictureError, read_picture

SHEET_SIDE_PX = 256
SHEET_GAP_PX = 4
LABEL_PX = 18
PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(slots=True)
class Kept:
    """One picture.

    Attributes:
        data: its file.
        origin: its prompt, or the file that it was loaded from.
        seed: None for one that was loaded.
    """

    number: int
    data: bytes
    origin: str
    seed: int | None
    width: int
    height: int
    is_saved: bool = False

    @property
    def png(self) -> bytes:
        """Its file, as a PNG."""
        return self.data if self.data.startswith(PNG_START) else as_png(self.picture)

    @property
    def picture(self) -> Image.Image:
        """Its pixels, upright, as they are drawn from."""
        return read_picture(self.data, self.width * self.height)


class Gallery:
    """All pictures of a session, in the order in which they came."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def unsaved(self) -> list[Kept]:
        """Those that would be lost at the end."""
        return [kept for kept in self._kept if not kept.is_saved]

    def add(self, data: bytes, origin: str, seed: int | None, size: tuple[int, int]) -> Kept:
        """Keep a picture that was drawn."""
        kept = Kept(len(self._kept), data, origin, seed, *size)
        self._kept.append(kept)
        return kept

    def load(self, path: Path, max_pixels: int) -> Kept:
        """Keep a picture of a file.

        Raises:
            LineError: it cannot be used.
        """
        try:
            data = path.read_bytes()
            picture = read_picture(data, max_pixels)
        except PictureError as error:
            raise LineError(f"{path} {error}") from None
        except OSError as error:
            raise LineError(f"cannot read {path}: {error.strerror}") from None
        kept = self.add(data, str(path), None, picture.size)
        kept.is_saved = True
        return kept

    def find(self, number: int) -> Kept:
        """The picture of a number, or the last.

        Raises:
            LineError: there is none.
        """
        if not self._kept:
            raise LineError("there is no picture yet; draw one, or !load a file")
        if number == LAST:
            return self._kept[-1]
        if number >= len(self._kept):
            last = self._kept[-1].number
            raise LineError(f"there is no ${number}; the pictures are $0 to ${last}")
        return self._kept[number]


def free_name(stem: str, directory: Path) -> Path:
    """A name for a PNG that no file has yet."""
    path, count = directory / f"{stem}.png", 1
    while path.exists():
        count += 1
        path = directory / f"{stem}-{count}.png"
    return path


def write_png(data: bytes, path: Path) -> None:
    """Write a PNG to a file that does not exist yet.

    Raises:
        LineError: it is there already, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise LineError(f"pictures are saved as PNG; give a name that ends in .png, not {path}")
    try:
        with path.open("xb") as target:
            target.write(data)
    except FileExistsError:
        raise LineError(f"{path} is there already; choose another name") from None
    except OSError as error:
        raise LineError(f"cannot write {path}: {error.strerror}") from None


def as_png(picture: Image.Image) -> bytes:
    """A picture as a file."""
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()


def sheet(pictures: Sequence[Kept]) -> Image.Image:
    """Pictures side by side, small, with their numbers."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    largest = max(max(kept.width, kept.height) for kept in pictures)
    scale = min(1.0, SHEET_SIDE_PX / largest)
    width = round(max(kept.width for kept in pictures) * scale) + SHEET_GAP_PX
    height = round(max(kept.height for kept in pictures) * scale) + SHEET_GAP_PX
    page = Image.new("RGB", (columns * width - SHEET_GAP_PX, rows * height - SHEET_GAP_PX))
    font = ImageFont.load_default(LABEL_PX)
    draw = ImageDraw.Draw(page)
    for place, kept in enumerate(pictures):
        left, top = place % columns * width, place // columns * height
        size = (max(1, round(kept.width * scale)), max(1, round(kept.height * scale)))
        page.paste(kept.picture.convert("RGB").resize(size), (left, top))
        draw.text(
            (left + 3, top + 1), f"${kept.number}", "white", font, stroke_width=2, stroke_fill=0
        )
    return page
