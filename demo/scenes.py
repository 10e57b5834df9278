"""What stands in a picture, and where: the symbols that a caption speaks of.

Owns the layout rules that make a caption mean one picture, and how scenes are
drawn at random. A caption that names no place means the middle, no size means
medium, no background means white. Knows nothing of words or pixels.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import Literal

from demo.language import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Rgb

BackgroundKind = Literal["plain", "gradient", "stripes", "checks"]
Direction = Literal["down", "across"]

SINGLE_RADII = {"small": 0.12, "medium": 0.20, "large": 0.30}
"""Radius of a figure by its size's name, as a share of the picture's shorter side."""
PLACED_RADII = {"small": 0.10, "medium": 0.15, "large": 0.22}
PAIR_RADII = {"small": 0.11, "medium": 0.16, "large": 0.21}
TRIPLE_RADII = {"small": 0.09, "medium": 0.13, "large": 0.15}
OUTER_RADIUS, INNER_RADIUS, OVERLAP_RADIUS = 0.36, 0.13, 0.22
MARGIN = 0.05
"""Between a figure and the picture's edge, as a share of the shorter side."""

CONTAINERS = tuple(s for s in SHAPES if s not in ("cross", "crescent", "arrow"))
"""Shapes that something can be inside of."""

SHADE_JITTER = 0.025
"""A named colour comes in shades this far apart; the seed picks one."""
LEAST_CONTRAST = 0.30
"""Between a figure's colour and everything it stands on, as a distance in RGB."""
HELD_OUT_OF = 20
"""One scene in so many is never trained on."""


@dataclass(frozen=True, slots=True)
class Background:
    """What the figures stand on.

    Attributes:
        colours: one for ``plain``, else two.
        direction: how the colour changes: down the picture or across it.
    """

    kind: BackgroundKind
    colours: tuple[str, ...]
    shades: tuple[Rgb, ...]
    direction: Direction = "down"


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape in a picture.

    Attributes:
        x, y: its middle, in pixels.
        radius: in pixels.
        size, place: the names that led there; None where the caption names none.
        colour_named, shape_named: whether the caption says it; if not, the seed chose.
    """

    shape: str
    colour: str
    shade: Rgb
    x: float
    y: float
    radius: float
    size: str | None = None
    place: str | None = None
    outline: str | None = None
    outline_shade: Rgb | None = None
    colour_named: bool = True
    shape_named: bool = True


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture. ``figures`` are painted in their order: later ones cover earlier ones.

    Attributes:
        relation: ``left of`` and ``above`` (first to second figure), ``behind`` (the first is),
            ``inside`` (the second is, as it is painted later).
        background_named: whether the caption says it.
    """

    width: int
    height: int
    figures: tuple[Figure, ...]
    background: Background
    relation: str | None = None
    background_named: bool = True

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see it. Depends on what is named, not on shades or pixels."""
        parts = [
            f"{f.shape} {f.colour} {f.size} {f.place} {f.outline}"
            for f in sorted(self.figures, key=lambda f: (f.shape, f.colour, f.x, f.y))
        ]
        back = self.background
        parts += [self.relation or "", back.kind, *back.colours, back.direction]
        return zlib.crc32("|".join(parts).encode()) % HELD_OUT_OF == 0


def shade_of(colour: str, rng: random.Random) -> Rgb:
    """A shade of a named colour."""
    red, green, blue = (
        min(1.0, max(0.0, channel + rng.uniform(-SHADE_JITTER, SHADE_JITTER)))
        for channel in COLOURS[colour]
    )
    return red, green, blue


def distance(a: Rgb, b: Rgb) -> float:
    """Euclidean distance in RGB, from 0 to the square root of 3."""
    return float(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5)


def place_xy(place: str, radius: float, width: int, height: int) -> tuple[float, float]:
    """The middle of a figure at a named place, in pixels; the whole figure stays inside."""
    near = radius + MARGIN * min(width, height)
    x = near if "left" in place else width - near if "right" in place else width / 2
    y = near if "top" in place else height - near if "bottom" in place else height / 2
    return x, y


def is_visible_on(colour: str, background: Background) -> bool:
    """Whether a colour stands out from every part of a background."""
    first = COLOURS[background.colours[0]]
    last = COLOURS[background.colours[-1]]
    if background.kind == "gradient":
        blends = [
            tuple(a + (b - a) * i / 8 for a, b in zip(first, last, strict=True)) for i in range(9)
        ]
    else:
        blends = [first, last]
    return all(distance(COLOURS[colour], (r, g, b)) > LEAST_CONTRAST for r, g, b in blends)


def stands_out(figure: Figure, background: Background) -> bool:
    """Whether a figure can be seen on a background, and its outline on both."""
    if not is_visible_on(figure.colour, background):
        return False
    return figure.outline is None or (
        is_visible_on(figure.outline, background)
        and distance(COLOURS[figure.outline], COLOURS[figure.colour]) > LEAST_CONTRAST
    )


def default_background(colours: tuple[str, ...], rng: random.Random) -> Background:
    """White; where something is white itself, black; where something is black too, grey."""
    colour = next(c for c in ("white", "black", "grey", "blue") if c not in colours)
    return Background("plain", (colour,), (shade_of(colour, rng),))


def random_background(rng: random.Random) -> Background:
    """Any background that has a name."""
    kind: BackgroundKind = rng.choices(
        ("plain", "gradient", "stripes", "checks"), (55, 15, 15, 15)
    )[0]
    count = 1 if kind == "plain" else 2
    while True:
        colours = tuple(rng.sample(tuple(COLOURS), count))
        if count == 1 or distance(COLOURS[colours[0]], COLOURS[colours[1]]) > LEAST_CONTRAST:
            break
    shades = tuple(shade_of(c, rng) for c in colours)
    turns = kind in ("gradient", "stripes")
    direction: Direction = rng.choice(("down", "across")) if turns else "down"
    return Background(kind, colours, shades, direction)


def random_scene(
    rng: random.Random, width: int = 256, height: int = 256, *, held_out: bool = False
) -> Scene:
    """A scene of one to three figures, held out from training or not."""
    while True:
        scene = _any_scene(rng, width, height)
        if scene is not None and scene.is_held_out == held_out:
            return scene


def _any_scene(rng: random.Random, width: int, height: int) -> Scene | None:
    count = rng.choices((1, 2, 3), (50, 38, 12))[0]
    background_named = rng.random() < 0.75
    background = random_background(rng) if background_named else None
    figures = tuple(_random_figure(rng) for _ in range(count))
    relation = None
    if count == 1:
        figures = (_single(figures[0], rng, width, height),)
    elif count == 2 and rng.random() < 0.65:
        relation = rng.choice(RELATIONS)
        figures = _related(relation, figures, rng, width, height)
    elif rng.random() < 0.55:
        figures = _placed(figures, rng, width, height)
    else:
        figures = _in_a_row(figures, rng, width, height)
    if background is None:
        if any(f.colour == "white" and not f.colour_named for f in figures):
            return None  # nobody asked for white, so nobody expects another background
        background = default_background(tuple(f.colour for f in figures), rng)
    scene = Scene(width, height, figures, background, relation, background_named)
    return scene if _is_clear(scene) else None


def _random_figure(rng: random.Random) -> Figure:
    colour = rng.choice(tuple(COLOURS))
    outline = rng.choice(tuple(COLOURS)) if rng.random() < 0.15 else None
    return Figure(
        shape=rng.choice(SHAPES),
        colour=colour,
        shade=shade_of(colour, rng),
        x=0.0,
        y=0.0,
        radius=0.0,
        outline=outline,
        outline_shade=None if outline is None else shade_of(outline, rng),
        colour_named=rng.random() < 0.96,
        shape_named=rng.random() < 0.99,
    )


def _random_size(rng: random.Random, share: float) -> str | None:
    return rng.choice(SIZES) if rng.random() < share else None


def _single(figure: Figure, rng: random.Random, width: int, height: int) -> Figure:
    size = _random_size(rng, 0.6)
    place = rng.choice(PLACES) if rng.random() < 0.6 else None
    radius = SINGLE_RADII[size or "medium"] * min(width, height)
    x, y = place_xy(place or "center", radius, width, height)
    return replace(figure, size=size, place=place, radius=radius, x=x, y=y)


def _placed(
    figures: tuple[Figure, ...], rng: random.Random, width: int, height: int
) -> tuple[Figure, ...]:
    placed = []
    for figure, place in zip(figures, rng.sample(PLACES, len(figures)), strict=True):
        size = _random_size(rng, 0.35)
        radius = PLACED_RADII[size or "medium"] * min(width, height)
        x, y = place_xy(place, radius, width, height)
        placed.append(replace(figure, size=size, place=place, radius=radius, x=x, y=y))
    return tuple(placed)


def _in_a_row(
    figures: tuple[Figure, ...], rng: random.Random, width: int, height: int
) -> tuple[Figure, ...]:
    radii = PAIR_RADII if len(figures) == 2 else TRIPLE_RADII
    shares = (0.26, 0.74) if len(figures) == 2 else (0.18, 0.5, 0.82)
    row = []
    for figure, share in zip(figures, shares, strict=True):
        size = _random_size(rng, 0.25)
        radius = radii[size or "medium"] * min(width, height)
        row.append(replace(figure, size=size, radius=radius, x=share * width, y=height / 2))
    return tuple(row)


def _related(
    relation: str, figures: tuple[Figure, ...], rng: random.Random, width: int, height: int
) -> tuple[Figure, ...]:
    first, second = figures
    side = min(width, height)
    middle = {"x": width / 2, "y": height / 2}
    if relation == "inside":
        outer = replace(second, shape=rng.choice(CONTAINERS), radius=OUTER_RADIUS * side, **middle)
        return outer, replace(first, radius=INNER_RADIUS * side, **middle)
    if relation == "behind":
        shift, radius = 0.1 * side, OVERLAP_RADIUS * side
        back = replace(first, x=width / 2 + shift, y=height / 2 - shift, radius=radius)
        return back, replace(second, x=width / 2 - shift, y=height / 2 + shift, radius=radius)
    pair = []
    for figure, share in ((first, 0.26), (second, 0.74)):
        size = _random_size(rng, 0.25)
        radius = PAIR_RADII[size or "medium"] * side
        x, y = (share * width, height / 2) if relation == "left of" else (width / 2, share * height)
        pair.append(replace(figure, size=size, radius=radius, x=x, y=y))
    return tuple(pair)


def _is_clear(scene: Scene) -> bool:
    """Whether every figure can be seen and told from the others by words."""
    touching = scene.relation in ("inside", "behind")
    for i, figure in enumerate(scene.figures):
        if not stands_out(figure, scene.background):
            return False
        for other in scene.figures[:i]:
            if (other.shape, other.colour) == (figure.shape, figure.colour):
                return False
            colours = [c for c in (other.colour, other.outline) if c is not None]
            mine = [c for c in (figure.colour, figure.outline) if c is not None]
            if touching:
                near = (distance(COLOURS[a], COLOURS[b]) for a in mine for b in colours)
                if min(near) <= LEAST_CONTRAST:
                    return False
            elif overlaps(figure, other, min(scene.width, scene.height)):
                return False
    return True


def overlaps(figure: Figure, other: Figure, side: int) -> bool:
    """Whether two figures come closer than a fiftieth of the picture's side."""
    apart = ((figure.x - other.x) ** 2 + (figure.y - other.y) ** 2) ** 0.5
    return apart < figure.radius + other.radius + 0.02 * side
