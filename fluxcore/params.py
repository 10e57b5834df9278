"""What one generation is asked for, and the checks that need no model.

Imports neither torch nor any other part of fluxcore but its errors, so that a
front end can validate a request without loading a framework.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from fluxcore.errors import InvalidParamsError

if TYPE_CHECKING:
    from PIL import Image

Schedule = Literal["flux", "linear", "power"]

SIZE_MULTIPLE = 16
MIN_SIDE_PX = 64
MAX_SIDE_PX = 2048
LARGEST_DEFAULT_SIDE_PX = 512
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_IMAGES = 10
MAX_REFERENCES = 10
MAX_PROMPT_CHARS = 32_000
# A prompt needs one such character. Spelled out, because dialects of regular expressions
# disagree about which of the others are white space; this means the same in all of them.
SAYS_SOMETHING = r"[^\s\x1c-\x1f\x85\ufeff]"
# Half of a UTF-16 pair, which stands for no character and cannot be written to any file.
SURROGATE = r"[\ud800-\udfff]"
MAX_SEED = 2**63 - 1
MIN_REFERENCE_SIDE_PX = 64
MAX_REFERENCE_ASPECT = 8.0
MAX_POWER_ALPHA = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """One request for pictures. ``None`` means "the default of the loaded model".

    Units: sizes in pixels, seed an integer from 0 to 2**63 - 1.

    Attributes:
        prompt: what to draw; at most 32000 characters, not blank.
        negative_prompt: what to steer away from; has an effect on base models only.
        width, height: multiples of 16 from 64 to 2048. ``None``: the size of the
            first reference (at most 1024 x 1024 pixels in area), else 512, or the
            side that the model is made for if that is less.
        steps: Euler steps, 1 to 200. ``None``: 4 on distilled models, 50 on base models.
        guidance: classifier-free guidance scale, 0 to 30; at most 1 turns it off.
            ``None``: 4.0 on base models. Has no effect on distilled models.
        seed: ``None`` draws one; the result says which. Picture i uses ``seed + i``.
        n: number of pictures, 1 to 10.
        schedule: ``flux`` (the reference's), ``linear`` or ``power``.
        power_alpha: exponent of the ``power`` schedule, above 0 and at most 10.
        references: up to 10 input pictures, given to the model as extra tokens.
        mask: inpainting. White (half or more of full brightness) marks what to draw
            again on the first reference; black stays. Same size as that reference.
        strength: inpainting only, above 0 and at most 1: the share of the schedule
            that is run, 1 draws the masked area from pure noise.

    Raises:
        InvalidParamsError: on construction, naming the first field that is wrong.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    n: int = 1
    schedule: Schedule = "flux"
    power_alpha: float = 2.0
    references: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_prompt("prompt", self.prompt)
        if re.search(SAYS_SOMETHING, self.prompt) is None:
            raise InvalidParamsError("prompt", "prompt must not be empty; say what to draw")
        if self.negative_prompt is not None:
            _check_prompt("negative_prompt", self.negative_prompt)
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None:
                check_side(name, value)
        if self.steps is not None:
            _check_int("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            _check_number("guidance", self.guidance, 0.0, MAX_GUIDANCE)
        _check_int("n", self.n, 1, MAX_IMAGES)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED - (self.n - 1))
        if self.schedule not in get_args(Schedule):
            allowed = ", ".join(get_args(Schedule))
            raise InvalidParamsError(
                "schedule", f"schedule must be one of {allowed}; got {self.schedule!r}"
            )
        _check_number("power_alpha", self.power_alpha, 0.0, MAX_POWER_ALPHA, above=True)
        _check_number("strength", self.strength, 0.0, 1.0, above=True)
        self._check_references()

    def _check_references(self) -> None:
        masks = () if self.mask is None else (self.mask,)
        for name, pictures in (("references", self.references), ("mask", masks)):
            if not isinstance(pictures, (tuple, list)) or not all(
                hasattr(picture, "convert") for picture in pictures
            ):
                raise InvalidParamsError(name, f"{name} must be given as PIL images")
        if len(self.references) > MAX_REFERENCES:
            raise InvalidParamsError(
                "references",
                f"at most {MAX_REFERENCES} references are allowed; got {len(self.references)}",
            )
        for i, reference in enumerate(self.references):
            _check_reference_size(i, reference.width, reference.height)
        if self.mask is None:
            if self.strength != 1.0:
                raise InvalidParamsError(
                    "strength", "strength applies to inpainting only; give a mask or leave it out"
                )
            return
        if not self.references:
            raise InvalidParamsError(
                "mask", "a mask needs a picture to paint in; give it as the first reference"
            )
        if self.mask.size != self.references[0].size:
            raise InvalidParamsError(
                "mask",
                f"mask must have the size of the first reference, "
                f"{_size(self.references[0])}; got {_size(self.mask)}",
            )
        if self.width is not None or self.height is not None:
            raise InvalidParamsError(
                "width" if self.width is not None else "height",
                "width and height follow the first reference when a mask is given; leave them out",
            )

    def summary(self) -> dict[str, Any]:
        """All fields that are plain values: everything but the pictures."""
        names = [f.name for f in fields(self) if f.name not in ("references", "mask")]
        return {name: getattr(self, name) for name in names}


def check_side(name: str, value: int) -> None:
    """Check one side of a picture, in pixels.

    Raises:
        InvalidParamsError: with the nearest sizes that would do.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidParamsError(name, f"{name} must be an integer; got {value!r}")
    if MIN_SIDE_PX <= value <= MAX_SIDE_PX and value % SIZE_MULTIPLE == 0:
        return
    bounded = min(max(value, MIN_SIDE_PX), MAX_SIDE_PX)
    below = bounded // SIZE_MULTIPLE * SIZE_MULTIPLE
    near = [below] if below == bounded else [below, below + SIZE_MULTIPLE]
    raise InvalidParamsError(
        name,
        f"{name} must be a multiple of {SIZE_MULTIPLE} from {MIN_SIDE_PX} to {MAX_SIDE_PX}; "
        f"got {value} (nearest: {', '.join(map(str, near))})",
    )


def _check_reference_size(index: int, width_px: int, height_px: int) -> None:
    short, long = sorted((width_px, height_px))
    if short < MIN_REFERENCE_SIDE_PX or long > short * MAX_REFERENCE_ASPECT:
        name = f"references[{index}]"
        raise InvalidParamsError(
            name,
            f"{name} must be at least {MIN_REFERENCE_SIDE_PX} pixels on each side "
            f"and at most {MAX_REFERENCE_ASPECT:g}:1; got {width_px}x{height_px}",
        )


def _check_prompt(name: str, value: str) -> None:
    if not isinstance(value, str):
        raise InvalidParamsError(name, f"{name} must be text; got {type(value).__name__}")
    if len(value) > MAX_PROMPT_CHARS:
        raise InvalidParamsError(
            name, f"{name} must have at most {MAX_PROMPT_CHARS} characters; got {len(value)}"
        )
    half = re.search(SURROGATE, value)
    if half is not None:
        raise InvalidParamsError(
            name, f"{name} must be valid Unicode text; character {half.start()} is half a pair"
        )


def _check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidParamsError(name, f"{name} must be an integer; got {value!r}")
    if not low <= value <= high:
        raise InvalidParamsError(name, f"{name} must be from {low} to {high}; got {value}")


def _check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # an int is always finite, and may be too large for math.isfinite
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidParamsError(name, f"{name} must be a finite number; got {value!r}")
    if not low <= value <= high or (above and value == low):
        start = f"above {low:g}" if above else f"from {low:g}"
        raise InvalidParamsError(name, f"{name} must be {start} to {high:g}; got {value}")


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
