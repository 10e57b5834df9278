"""A typed line: something to draw, or a command. Knows nothing of what either does."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from app.settings import parse_size

LAST = -1
_SIZE = re.compile(r"\d+[x×]\d+")
_PICTURE = re.compile(r"\$(\d{0,9})")


class LineError(Exception):
    """The line makes no sense; the message says what would."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Something to draw.

    Attributes:
        size: width and height in pixels, where the line says so.
        references: numbers of pictures; ``LAST`` is the last one.
    """

    prompt: str
    size: tuple[int, int] | None = None
    references: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A command and what follows it."""

    name: str
    argument: str


def parse_line(line: str) -> Wish | Call | None:
    """What a line means; None for an empty one.

    Raises:
        LineError: it makes no sense.
    """
    line = line.strip()
    if not line:
        return None
    if line.startswith("!"):
        name, _, argument = line[1:].partition(" ")
        return Call(name.lower(), argument.strip())
    return parse_wish(line)


def parse_wish(line: str) -> Wish:
    """Size and references, in any order, then the prompt.

    Raises:
        LineError: a size that cannot be drawn, or nothing to draw.
    """
    size: tuple[int, int] | None = None
    references: list[int] = []
    rest = line.strip()
    while rest:
        word, _, after = rest.partition(" ")
        if _SIZE.fullmatch(word):
            size = read_size(word)
        elif (number := picture_number(word)) is not None:
            references.append(number)
        else:
            break
        rest = after.lstrip()
    # What looks like a size or a picture can so be drawn, too.
    prompt = rest.removeprefix("\\")
    if not prompt:
        raise LineError(f"say what to draw after {line!r}, such as: {line.strip()} a blue star")
    return Wish(prompt, size, tuple(references))


def picture_number(word: str) -> int | None:
    """The number in ``$3``; ``LAST`` for ``$`` alone; None for any other word."""
    found = _PICTURE.fullmatch(word)
    if found is None:
        return None
    return int(found[1]) if found[1] else LAST


def read_size(word: str) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        LineError: not one that can be drawn.
    """
    try:
        return parse_size(word.replace("×", "x"))
    except ValueError as error:
        raise LineError(str(error)) from None


def read_path(text: str) -> Path:
    """A file's name; ~ is a home directory.

    Raises:
        LineError: no file can have it.
    """
    try:
        path = Path(text).expanduser()
        is_sound = b"\0" not in os.fsencode(path)
    except (RuntimeError, ValueError):
        is_sound = False
    if not is_sound:
        raise LineError(f"no file can have the name {text!r}")
    return path


def read_whole(name: str, text: str) -> int:
    """A whole number.

    Raises:
        LineError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise LineError(f"{name} takes a whole number; got {text!r}") from None


def read_number(name: str, text: str) -> float:
    """A number.

    Raises:
        LineError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise LineError(f"{name} takes a number; got {text!r}") from None
