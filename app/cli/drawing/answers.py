"""What a service sends, read with nothing trusted: it may be broken, another program, or hostile.

Owns the shape of answers and events. Their texts are shown on a terminal, so that no
character of them may steer it; their pictures are opened by whoever shows or saves them.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from app.cli.drawing.contract import DrawingError, Drawn, Watcher, step_note
from app.engine.packing import PackedPicture
from app.engine.pictures import PictureError, read_picture
from fluxcore.params import MAX_SIDE_PX

MOST_PIXELS = MAX_SIDE_PX**2

Tell = Callable[[Watcher], None]


def parse_json(text: str | bytes) -> Any:
    """JSON, with a space for each character that is not to be seen.

    Raises:
        ValueError: it is none.
    """
    try:
        return _printable(json.loads(text))
    except RecursionError:
        raise ValueError("too deep") from None


def read_event(name: str, text: str, pictures: int) -> Drawn | Tell | None:
    """What an event of a job says: its result, news for a watcher, or nothing that is known.

    Args:
        pictures: how many were ordered.

    Raises:
        DrawingError: the job failed, or the event makes no sense.
    """
    with _understood():
        data = parse_json(text)
        match name:
            case "completed":
                return _drawn(data)
            case "error":
                wrong_order = data["error"].get("code") == "invalid_value"
                raise DrawingError(str(data["error"]["message"]), is_wrong_order=wrong_order)
            case "queued":
                wait_s, place = _seconds(data["eta_s"]), f"at place {int(data['position'])}"
                return lambda watcher: watcher.show("waiting", left_s=wait_s, note=place)
            case "started":
                return lambda watcher: watcher.show("reading the prompt")
            case "step":
                share, left_s = _number(data["percent"]) / 100, _seconds(data["eta_s"])
                index, step, steps = (int(data[key]) for key in ("image_index", "step", "steps"))
                note = step_note(index, pictures, step, steps)
                return lambda watcher: watcher.show("drawing", share, left_s, note)
            case "preview":
                of_picture, file = int(data["image_index"]), _file(data["b64"])
                read_picture(file, MOST_PIXELS)
                return lambda watcher: watcher.preview(of_picture, file)
    return None


def progress(body: dict[str, Any]) -> float:
    """How far a service is that gets ready, 0 to 1.

    Raises:
        DrawingError: it says no number.
    """
    with _understood():
        return _number(body.get("progress", 0))


@contextmanager
def _understood() -> Iterator[None]:
    """Say in plain words that what came has not the shape of an answer."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise DrawingError(
            "the service's answer makes no sense; is it fluxd, and of this version?"
        ) from None
    except PictureError as error:
        raise DrawingError(f"a picture that the service sent {error}") from None


def _drawn(data: Any) -> Drawn:
    timings = data["timings"].items()
    return Drawn(
        pictures=tuple(map(_packed, data["images"])),
        timings_ms={name.removesuffix("_ms"): _number(ms) for name, ms in timings},
        warnings=tuple(map(str, data["warnings"])),
    )


def _packed(image: dict[str, Any]) -> PackedPicture:
    file = _file(image["b64"])
    width, height = read_picture(file, MOST_PIXELS).size
    return PackedPicture(file, image["format"], int(image["seed"]), width, height)


def _file(encoded: str) -> bytes:
    return base64.b64decode(encoded, validate=True)


def _seconds(value: Any) -> float | None:
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a number is expected")
    return number


def _printable(value: Any) -> Any:
    match value:
        case str():
            if value.isprintable():
                return value
            return "".join(one if one.isprintable() else " " for one in value)
        case list():
            return [_printable(one) for one in value]
        case dict():
            return {_printable(name): _printable(one) for name, one in value.items()}
    return value
