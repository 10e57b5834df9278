"""What the fields of an OpenAI image request mean for a generation.

Owns the defaults, the aliases' precedence and how a size and a mask go together.
An error names the field as the client sent it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Resampling

from app.api.input_pictures import InputPictures
from app.api.openai.fields import MAX_PARTIAL_IMAGES, ImagesRequest
from app.engine import Packing
from app.errors import InvalidRequestError, renamed
from app.settings import Settings
from fluxcore.errors import InvalidParamsError
from fluxcore.fitting import LARGEST_REFERENCE_AREA
from fluxcore.params import GenerationParams, check_side

# A picture under a mask is brought to the size asked for; to stretch it by more would show.
MAX_STRETCH = 0.02
# The contract's default; 0 is the least that the encoders take as 1.
DEFAULT_COMPRESSION = 100

_SIZE = re.compile(r"([0-9]{1,5})[xX]([0-9]{1,5})")
_STEPS = ("num_inference_steps", "steps", "step")
_GUIDANCE = ("guidance_scale", "guidance", "cfg_scale", "cfg")
_NO_SIZE = (None, "auto", "")


@dataclass(slots=True)
class Drawn:
    """A request as a generation, and what its answer must say besides.

    Attributes:
        params: all but the pictures.
        previews: how many a stream is to bring of each picture.
        size: what was asked for, in pixels; a picture under a mask is brought to it.
        names: what the request calls a parameter.
        warnings: what was accepted and has no effect.
    """

    params: GenerationParams
    packing: Packing
    previews: int
    size: tuple[int, int] | None
    names: dict[str, str]
    warnings: list[str]


def read_fields(asked: ImagesRequest, settings: Settings, *, has_pictures: bool) -> Drawn:
    """Check a request's fields, all but its pictures.

    Raises:
        InvalidRequestError: naming the field.
    """
    if asked.background == "transparent":
        raise InvalidRequestError(
            "background must be auto or opaque; got transparent, and the model draws none",
            param="background",
        )
    if asked.stream and asked.response_format == "url":
        raise InvalidRequestError(
            "response_format must be b64_json with stream: the events hold the pictures",
            param="response_format",
        )
    names: dict[str, str] = {}
    given: dict[str, Any] = {"n": 1 if asked.n is None else asked.n}
    warnings = _warnings(asked)
    for target, aliases in (("steps", _STEPS), ("guidance", _GUIDANCE)):
        found = _one_of(asked, aliases)
        for name, value in found:
            _check(target, name, value)
        if found:
            given[target] = found[0][1]
        warnings += [
            f"{name} has no effect beside {found[0][0]}"
            for name, value in found[1:]
            if value != found[0][1]
        ]
    if asked.seed is not None and asked.seed != -1:
        given["seed"] = asked.seed
    if asked.negative_prompt:
        given["negative_prompt"] = asked.negative_prompt
    sides = _sides(asked, settings, names, has_pictures=has_pictures)
    given |= sides
    try:
        params = GenerationParams(prompt=asked.prompt, **given)
    except InvalidParamsError as error:
        raise renamed(error, names) from None
    size = (sides["width"], sides["height"]) if len(sides) == 2 else None
    return Drawn(params, _packing(asked), _previews(asked), size, names, warnings)


def with_pictures(drawn: Drawn, pictures: InputPictures, name: str) -> GenerationParams:
    """The whole request. Slow under a mask: call it off the event loop.

    Args:
        name: what the request calls its references.

    Raises:
        InvalidRequestError: naming the field.
    """
    references, mask = pictures.references, pictures.mask
    params = drawn.params
    if mask is not None and drawn.size is not None:
        # The size is the picture's here, so the picture is brought to the size.
        params = replace(params, width=None, height=None)
        if references and references[0].size == mask.size:
            _check_stretch(mask.size, drawn)
            resized = references[0].resize(drawn.size, Resampling.LANCZOS)
            references = (resized, *references[1:])
            mask = mask.resize(drawn.size, Resampling.NEAREST)
    try:
        return replace(params, references=references, mask=mask)
    except InvalidParamsError as error:
        raise renamed(error, {**drawn.names, "references": name}) from None


def _one_of(asked: ImagesRequest, aliases: Sequence[str]) -> list[tuple[str, Any]]:
    """What was given under the names of one parameter; the first counts."""
    return [(name, value) for name in aliases if (value := getattr(asked, name)) is not None]


def _check(target: str, name: str, value: Any) -> None:
    """Judge one value by itself, also one that has no effect."""
    given: dict[str, Any] = {target: value}
    try:
        GenerationParams(prompt="any", **given)
    except InvalidParamsError as error:
        raise renamed(error, {target: name}) from None


def _sides(
    asked: ImagesRequest, settings: Settings, names: dict[str, str], *, has_pictures: bool
) -> dict[str, int]:
    """Width and height, in pixels; of edits without a size, only what was given."""
    sides = _from_size(asked.size)
    names |= dict.fromkeys(sides, "size")
    if not sides and not has_pictures:
        defaults = {"width": settings.default_width, "height": settings.default_height}
        sides = {name: side for name, side in defaults.items() if side is not None}
    for name in ("width", "height"):
        value = getattr(asked, name)
        if value is not None:
            sides[name], names[name] = value, name
    return sides


def _from_size(size: str | None) -> dict[str, int]:
    if size in _NO_SIZE:
        return {}
    match = _SIZE.fullmatch(size or "")
    if match is None:
        raise InvalidRequestError(
            f"size must be auto or WIDTHxHEIGHT, such as 1024x1024; got {size!r:.60}",
            param="size",
        )
    sides = {"width": int(match[1]), "height": int(match[2])}
    for name, side in sides.items():
        try:
            check_side(name, side)
        except InvalidParamsError as error:
            raise InvalidRequestError(f"size: {error.message}", param="size") from None
    return sides


def _previews(asked: ImagesRequest) -> int:
    wanted = asked.partial_images or 0
    if not 0 <= wanted <= MAX_PARTIAL_IMAGES:
        raise InvalidRequestError(
            f"partial_images must be from 0 to {MAX_PARTIAL_IMAGES}; got {wanted}",
            param="partial_images",
        )
    return wanted if asked.stream else 0


def _packing(asked: ImagesRequest) -> Packing:
    compression = asked.output_compression
    if compression is None:
        compression = DEFAULT_COMPRESSION
    if not 0 <= compression <= 100:
        raise InvalidRequestError(
            f"output_compression must be from 0 to 100; got {compression}",
            param="output_compression",
        )
    return Packing(asked.format, max(1, compression))


def _warnings(asked: ImagesRequest) -> list[str]:
    found = []
    if asked.output_compression is not None and asked.format == "png":
        found.append("output_compression has no effect on png, which is lossless")
    if asked.partial_images and not asked.stream:
        found.append("partial_images has no effect without stream")
    return found


def _check_stretch(picture: tuple[int, int], drawn: Drawn) -> None:
    assert drawn.size is not None, "the caller knows the size"
    width, height = drawn.size
    param = drawn.names.get("width", "width")
    if width * height > LARGEST_REFERENCE_AREA:
        raise InvalidRequestError(
            f"with a mask, {param} may ask for at most 1024x1024 pixels in area; "
            f"got {width}x{height}",
            param=param,
        )
    stretch = (width * picture[1]) / (height * picture[0])
    if not 1 / (1 + MAX_STRETCH) <= stretch <= 1 + MAX_STRETCH:
        raise InvalidRequestError(
            f"with a mask, {param} must have the proportions of the first image, "
            f"{picture[0]}x{picture[1]}; got {width}x{height} (auto takes the image's own)",
            param=param,
        )
