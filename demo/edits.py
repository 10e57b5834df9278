"""Tasks with reference pictures: what is given, what is asked, what must come out.

Owns the instructions and how they change a scene. What an instruction does not
speak of stays as it is, down to its shade.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from demo.captions import background_text, figure_text, place_text
from demo.language import COLOURS, PLACES, SHAPES, SIZES, with_article, word
from demo.scenes import (
    LEAST_CONTRAST,
    SINGLE_RADII,
    Background,
    Figure,
    Scene,
    distance,
    overlaps,
    place_xy,
    random_background,
    random_scene,
    shade_of,
    stands_out,
)

ADDED_SIZE = "small"
DEFAULT_PLACES = ("top right", "bottom left", "top left", "bottom right")
"""Where an added figure goes when nothing is said: the first that is free."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One task.

    Attributes:
        kind: its name in the judge's table.
        references: the pictures given.
        instruction: what is asked.
        target: the picture that must come out.
    """

    kind: str
    references: tuple[Scene, ...]
    instruction: str
    target: Scene

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see it."""
        return self.target.is_held_out


def random_edit(
    rng: random.Random,
    width: int = 256,
    height: int = 256,
    shares: Mapping[Maker, float] | None = None,
    *,
    held_out: bool = False,
) -> Edit:
    """A task with references.

    Args:
        shares: how often each task comes; EDITS if nothing is said.
    """
    makers, weights = zip(*(EDITS if shares is None else shares).items(), strict=True)
    while True:
        edit = rng.choices(makers, weights)[0](rng, width, height)
        if edit is not None and edit.is_held_out == held_out:
            text = edit.instruction
            if rng.random() < 0.2:
                text = text[0].upper() + text[1:]
            if rng.random() < 0.2:
                text += "."
            return replace(edit, instruction=text)


def _single(rng: random.Random, width: int, height: int) -> Scene:
    while True:
        scene = random_scene(rng, width, height)
        if len(scene.figures) == 1:
            return scene


def _one_or_two(rng: random.Random, width: int, height: int) -> Scene:
    while True:
        scene = random_scene(rng, width, height)
        if len(scene.figures) == 1 or (len(scene.figures) == 2 and rng.random() < 0.8):
            return scene


def _call(scene: Scene, index: int, rng: random.Random) -> str:
    """A phrase that means one figure of a scene and no other."""
    figure = scene.figures[index]
    others = [f for i, f in enumerate(scene.figures) if i != index]
    shape, colour = word(figure.shape, rng), word(figure.colour, rng)
    names = [f"the {colour} {shape}"]
    if all(f.shape != figure.shape for f in others):
        names += [f"the {shape}", f"the {shape}"]
    if all(f.colour != figure.colour for f in others) and others:
        names.append(f"the {colour} one")
    if not others:
        names += ["it", "it", "the shape"]
    return rng.choice(names)


def _changed(scene: Scene, index: int, figure: Figure) -> Scene | None:
    """The scene with one figure replaced, if everything is still told apart."""
    figures = tuple(figure if i == index else f for i, f in enumerate(scene.figures))
    target = replace(scene, figures=figures)
    return target if _is_legible(target) else None


def _is_legible(scene: Scene) -> bool:
    for i, figure in enumerate(scene.figures):
        if not stands_out(figure, scene.background):
            return False
        for other in scene.figures[:i]:
            near = (other.colour, other.outline)
            if any(
                distance(COLOURS[a], COLOURS[b]) <= LEAST_CONTRAST
                for a in (figure.colour, figure.outline)
                for b in near
                if a is not None and b is not None
            ):
                return False
    return True


def _recolour(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _one_or_two(rng, width, height)
    index = rng.randrange(len(scene.figures))
    figure = scene.figures[index]
    colour = rng.choice([c for c in COLOURS if c != figure.colour])
    target = _changed(scene, index, replace(figure, colour=colour, shade=shade_of(colour, rng)))
    if target is None:
        return None
    what, name = _call(scene, index, rng), word(colour, rng)
    text = rng.choice(
        (
            f"make {what} {name}",
            f"make {what} {name}",
            f"turn {what} {name}",
            f"paint {what} {name}",
            f"change the color of {what} to {name}",
            f"recolor {what} {name}",
        )
    )
    return Edit("recolour", (scene,), text, target)


def _move(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _single(rng, width, height)
    figure = scene.figures[0]
    place = rng.choice([p for p in PLACES if p != (figure.place or "center")])
    x, y = place_xy(place, figure.radius, width, height)
    target = _changed(scene, 0, replace(figure, place=place, x=x, y=y))
    if target is None:
        return None
    what, name = _call(scene, 0, rng), word(place, rng)
    text = rng.choice(
        (
            f"move {what} to the {name}",
            f"move {what} to the {name}",
            f"put {what} {place_text(place, rng)}",
            f"place {what} {place_text(place, rng)}",
        )
    )
    return Edit("move", (scene,), text, target)


def _resize(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _single(rng, width, height)
    figure = scene.figures[0]
    now = figure.size or "medium"
    size = rng.choice([s for s in SIZES if s != now])
    radius = SINGLE_RADII[size] * min(width, height)
    x, y = place_xy(figure.place or "center", radius, width, height)
    target = _changed(scene, 0, replace(figure, size=size, radius=radius, x=x, y=y))
    if target is None:
        return None
    what = _call(scene, 0, rng)
    texts = [f"make {what} {word(size, rng)}"]
    if abs(SIZES.index(size) - SIZES.index(now)) == 1:
        grows = SIZES.index(size) > SIZES.index(now)
        texts.append(f"make {what} {rng.choice(('bigger', 'larger') if grows else ('smaller',))}")
    return Edit("resize", (scene,), rng.choice(texts), target)


def _reshape(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _one_or_two(rng, width, height)
    if scene.relation == "inside":
        return None
    index = rng.randrange(len(scene.figures))
    figure = scene.figures[index]
    shape = rng.choice([s for s in SHAPES if s != figure.shape])
    target = _changed(scene, index, replace(figure, shape=shape))
    if target is None:
        return None
    what, name = _call(scene, index, rng), with_article(word(shape, rng))
    text = rng.choice(
        (
            f"turn {what} into {name}",
            f"change {what} into {name}",
            f"make {what} {name}",
            f"replace {what} with {name}",
        )
    )
    return Edit("reshape", (scene,), text, target)


def _outline(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _one_or_two(rng, width, height)
    index = rng.randrange(len(scene.figures))
    figure = scene.figures[index]
    if figure.outline is not None:
        return None
    colour = rng.choice(tuple(COLOURS))
    target = _changed(
        scene, index, replace(figure, outline=colour, outline_shade=shade_of(colour, rng))
    )
    if target is None:
        return None
    what, line = _call(scene, index, rng), with_article(word(colour, rng))
    text = rng.choice((f"give {what} {line} outline", f"add {line} outline to {what}"))
    return Edit("outline", (scene,), text, target)


def _new_background(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _one_or_two(rng, width, height)
    background = random_background(rng)
    if (background.kind, background.colours) == (scene.background.kind, scene.background.colours):
        return None
    target = replace(scene, background=background, background_named=True)
    if not _is_legible(target):
        return None
    name = background_text(background, rng)
    them = _call(scene, 0, rng) if len(scene.figures) == 1 else "them"
    texts = [
        f"put {them} on {with_article(name)}",
        f"change the background to {with_article(name)}",
        f"use {with_article(name)}",
    ]
    if background.kind == "plain":
        colour = word(background.colours[0], rng)
        texts += [f"make the background {colour}", f"change the background to {colour}"]
    return Edit("background", (scene,), rng.choice(texts), target)


def _add(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _single(rng, width, height)
    side = min(width, height)
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    radius = SINGLE_RADII[ADDED_SIZE] * side
    new = Figure(shape, colour, shade_of(colour, rng), 0.0, 0.0, radius)

    def at(place: str) -> Figure | None:
        x, y = place_xy(place, radius, width, height)
        moved = replace(new, x=x, y=y, place=place)
        return None if overlaps(moved, scene.figures[0], side) else moved

    named = rng.random() < 0.5
    places = rng.sample(PLACES, len(PLACES)) if named else list(DEFAULT_PLACES)
    found = next((figure for figure in map(at, places) if figure is not None), None)
    if found is None:
        return None
    target = replace(scene, figures=(*scene.figures, found))
    if not _is_legible(target):
        return None
    what = figure_text(new, rng)
    where = f" {place_text(found.place or 'center', rng)}" if named else ""
    text = rng.choice((f"add {what}{where}", f"add {what}{where}", f"draw {what}{where}, too"))
    return Edit("add", (scene,), text, target)


def _remove(rng: random.Random, width: int, height: int) -> Edit | None:
    scene = _one_or_two(rng, width, height)
    index = rng.randrange(len(scene.figures))
    figures = tuple(f for i, f in enumerate(scene.figures) if i != index)
    what = _call(scene, index, rng)
    text = rng.choice((f"remove {what}", f"remove {what}", f"delete {what}", f"take {what} away"))
    return Edit("remove", (scene,), text, replace(scene, figures=figures, relation=None))


def _shape_in_colour(rng: random.Random, width: int, height: int) -> Edit | None:
    first, second = _single(rng, width, height), _single(rng, width, height)
    donor = second.figures[0]
    figure = replace(first.figures[0], colour=donor.colour, shade=donor.shade)
    target = _changed(first, 0, figure)
    if target is None:
        return None
    text = rng.choice(
        (
            "the shape of image 1 in the color of image 2",
            "draw the shape of image 1 in the color of image 2",
            "give the shape of image 1 the color of image 2",
            "image 1 in the color of image 2",
        )
    )
    return Edit("shape and colour", (first, second), text, target)


def _onto_background(rng: random.Random, width: int, height: int) -> Edit | None:
    first, second = _single(rng, width, height), _single(rng, width, height)
    background: Background = second.background
    target = replace(first, background=background)
    if not _is_legible(target):
        return None
    text = rng.choice(
        (
            "the shape of image 1 on the background of image 2",
            "put the shape of image 1 on the background of image 2",
            "image 1 with the background of image 2",
        )
    )
    return Edit("background of another", (first, second), text, target)


Maker = Callable[[random.Random, int, int], Edit | None]
EDITS: Mapping[Maker, float] = {
    _recolour: 4.0,
    _move: 4.0,
    _resize: 1.5,
    _reshape: 2.5,
    _outline: 1.0,
    _new_background: 3.0,
    _add: 3.0,
    _remove: 3.0,
}
"""One reference: how often each is asked for, by the judge and at first in training."""
HARD_EDITS: Mapping[Maker, float] = {
    _recolour: 2.0,
    _move: 5.0,
    _resize: 4.0,
    _reshape: 4.0,
    _outline: 1.5,
    _new_background: 3.0,
    _add: 3.5,
    _remove: 2.0,
}
"""The same with more of what is hard to learn, to go on with."""
COMBINATIONS: Mapping[Maker, float] = {_shape_in_colour: 3.0, _onto_background: 2.0}
"""Two references."""
