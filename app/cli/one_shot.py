"""``fluxd generate``: draw, write files, show them, say how long it took.

Everything that can be wrong with the request is found before the model is loaded.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from app.cli.console import UsageError, progress_bar, say
from app.cli.drawing import MOST_PREVIEWS, Drawn, Order, open_artist
from app.cli.onlooker import Onlooker
from app.cli.terminal import Screen, open_screen
from app.engine.packing import PackedPicture, Packing, PictureFormat
from app.engine.pictures import PictureError, read_mask, read_picture
from app.settings import Settings
from app.telemetry import configure_logging
from fluxcore.params import MAX_REFERENCES, GenerationParams

STANDARD = "-"
FORMAT_OF_SUFFIX: dict[str, PictureFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The command's arguments.

    Attributes:
        params: fields of ``GenerationParams``.
        server: address of a service; None draws in this process.
        graphics: how to show pictures on the terminal; None shows none.
        shows_steps: show what is coming, too.
    """

    prompt: str
    output: str
    params: Mapping[str, Any]
    references: tuple[Path, ...]
    mask: Path | None
    quality: int
    server: str | None
    key: str | None
    graphics: str | None
    shows_steps: bool


def draw(wanted: Wanted, settings: Settings) -> None:
    """Run the command.

    Raises:
        UsageError, InvalidParamsError: the request cannot work.
        FluxError, ServiceError, DrawingError, OSError: loading, drawing or writing failed.
    """
    configure_logging("error" if settings.log_level == "error" else "warning", settings.log_format)
    order = _order(wanted, settings)
    screen = None if wanted.graphics is None else _screen(wanted)
    with open_artist(settings, wanted.server, wanted.key, is_warmed=False) as artist:
        if artist.note is not None:
            say(artist.note)
        with progress_bar() as bar:
            onlooker = Onlooker(bar, screen)
            drawn = artist.draw(order, onlooker)
        _deliver(drawn, wanted.output, onlooker)
        load_ms = artist.load_ms
    for warning in drawn.warnings:
        say(f"warning: {warning}")
    timings = {**({} if load_ms is None else {"load": load_ms}), **drawn.timings_ms}
    say("  ".join(f"{name} {ms:.0f} ms" for name, ms in timings.items()))


def _deliver(drawn: Drawn, output: str, onlooker: Onlooker) -> None:
    """Write every picture before any is shown: a terminal may fail, too."""
    paths = _paths(output, len(drawn.pictures))
    for path, picture in zip(paths, drawn.pictures, strict=True):
        if path is None:
            sys.stdout.buffer.write(picture.data)
            sys.stdout.buffer.flush()
        else:
            path.write_bytes(picture.data)
    for path, picture in zip(paths, drawn.pictures, strict=True):
        onlooker.picture(Image.open(io.BytesIO(picture.data)))
        say(f"{path or 'standard output'}  {_described(picture)}")


def _described(picture: PackedPicture) -> str:
    return f"{picture.width}x{picture.height}  seed {picture.seed}"


def _screen(wanted: Wanted) -> Screen:
    assert wanted.graphics is not None, "asked for only where pictures are to be shown"
    screen = open_screen(wanted.graphics)
    if screen.is_standard_output and wanted.output == STANDARD:
        raise UsageError(
            "standard output cannot take the file and show the picture; give -o a file name"
        )
    if screen.note is not None:
        say(screen.note)
    return screen


def _order(wanted: Wanted, settings: Settings) -> Order:
    given = {name: value for name, value in wanted.params.items() if value is not None}
    packing = Packing(_output_format(wanted.output, given.get("n", 1)), wanted.quality)
    prompt = sys.stdin.read().strip() if wanted.prompt == STANDARD else wanted.prompt
    for name in ("prompt", "negative_prompt"):
        text = prompt if name == "prompt" else given.get(name, "")
        if not _is_unicode(text):
            raise UsageError(f"the {name.replace('_', ' ')} is not valid UTF-8")
    if not wanted.references and wanted.server is None:
        given = {"width": settings.default_width, "height": settings.default_height, **given}
    most = settings.max_references if wanted.server is None else MAX_REFERENCES
    if len(wanted.references) > most:
        raise UsageError(f"at most {most} --image are allowed; got {len(wanted.references)}")
    # What is cheap to check comes before the pictures are read.
    GenerationParams(prompt=prompt, **{**given, "strength": 1.0})
    limit = settings.max_image_pixels
    read = [_read(path, read_picture, limit) for path in wanted.references]
    mask = None if wanted.mask is None else _read(wanted.mask, read_mask, limit)
    return Order(
        GenerationParams(
            prompt=prompt,
            references=tuple(picture for picture, _ in read),
            mask=None if mask is None else mask[0],
            **given,
        ),
        reference_files=tuple(file for _, file in read),
        mask_file=None if mask is None else mask[1],
        packing=packing,
        previews=MOST_PREVIEWS if wanted.shows_steps else 0,
    )


def _is_unicode(text: str) -> bool:
    """False for bytes of the command line that were no text, which Python keeps as surrogates."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def _read(
    path: Path, read: Callable[[bytes, int], Image.Image], max_pixels: int
) -> tuple[Image.Image, bytes]:
    """A picture, and the file that it came as."""
    try:
        file = path.read_bytes()
        return read(file, max_pixels), file
    except PictureError as error:
        raise UsageError(f"{path} {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _output_format(output: str, n: int) -> PictureFormat:
    if output == STANDARD:
        if n > 1:
            raise UsageError("standard output takes one picture; give a file name or --n 1")
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal; redirect it or give a file name")
        return "png"
    path = Path(output)
    found = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if found is None:
        allowed = ", ".join(FORMAT_OF_SUFFIX)
        raise UsageError(f"the output's name must end in one of {allowed}; got {output!r}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent}; create it first")
    return found


def _paths(output: str, n: int) -> Sequence[Path | None]:
    if output == STANDARD:
        return [None]
    path = Path(output)
    if n == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, n + 1)]
