"""A scene in words, one of many ways to say it.

Owns the grammar: word order, articles, synonyms, punctuation. What a sentence
leaves unsaid, the layout rules of ``demo.scenes`` decide.
"""

from __future__ import annotations

import random

from demo.language import with_article, word
from demo.scenes import Background, Figure, Scene

OPENINGS = (
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "draw ",
    "please draw ",
    "show me ",
    "there is ",
)
PLACE_FIRST = ("in ", "at ", "on ", "left", "top")
"""How a sentence begins that names a place before the figure; no opening fits before it."""


def caption(scene: Scene, rng: random.Random) -> str:
    """One way to describe a scene; it names all that the scene says is named."""
    terse = rng.random() < 0.15
    body = _figures_text(scene, rng, terse)
    if rng.random() < 0.25 and not terse and not body.startswith(PLACE_FIRST):
        body = rng.choice(OPENINGS) + body
    text = body
    if scene.background_named:
        text = _with_background(body, scene.background, rng, terse)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.2:
        text += "."
    return text


def figure_text(figure: Figure, rng: random.Random, *, article: bool = True) -> str:
    """One figure with its size, colour and outline, without its place."""
    noun = word(figure.shape, rng) if figure.shape_named else rng.choice(("shape", "figure"))
    colour = word(figure.colour, rng) if figure.colour_named else None
    size = None if figure.size is None else word(figure.size, rng)
    style = rng.random()
    after = ""
    adjectives = [size, colour]
    if style < 0.12:
        adjectives = [colour, size]
    elif style < 0.20 and colour is not None:
        adjectives, after = [size], rng.choice((f" in {colour}", f" that is {colour}"))
    text = " ".join([*(a for a in adjectives if a is not None), noun]) + after
    if figure.outline is not None:
        line = word(figure.outline, rng)
        text += rng.choice(
            (
                f" with {with_article(line)} outline",
                f" with {with_article(line)} border",
                f" outlined in {line}",
            )
        )
    return with_article(text) if article else text


def place_text(place: str, rng: random.Random) -> str:
    """A place as a phrase: ``in the top left``."""
    name = word(place, rng)
    if place == "center":
        return rng.choice((f"in the {name}", f"at the {name}", "centered"))
    if " " in place:
        if rng.random() < 0.3:
            name = name.replace("top", "upper").replace("bottom", "lower")
        return rng.choice((f"in the {name}", f"at the {name}", f"in the {name} corner"))
    if place in ("left", "right"):
        return rng.choice((f"on the {name}", f"at the {name}", f"on the {name} side"))
    return rng.choice((f"at the {name}", f"on the {name}", f"at the {name} of the picture"))


def background_text(background: Background, rng: random.Random) -> str:
    """A background as a noun phrase without article, ending in ``background`` or ``gradient``."""
    first, last = word(background.colours[0], rng), word(background.colours[-1], rng)
    across = background.direction == "across"
    match background.kind:
        case "plain":
            return f"{rng.choice(('', '', '', 'plain ', 'solid '))}{first} background"
        case "gradient":
            if across:
                return rng.choice(
                    (
                        f"horizontal gradient from {first} to {last}",
                        f"{first} to {last} gradient from left to right",
                        f"horizontal {first} to {last} gradient background",
                    )
                )
            return rng.choice(
                (
                    f"gradient from {first} to {last}",
                    f"{first} to {last} gradient background",
                    f"vertical gradient from {first} to {last}",
                    f"gradient background from {first} at the top to {last} at the bottom",
                )
            )
        case "stripes":
            kind = "vertical" if across else rng.choice(("horizontal", ""))
            return (
                rng.choice(
                    (
                        f"{kind} {first} and {last} striped background",
                        f"background with {kind} {first} and {last} stripes",
                        f"{kind} striped {first} and {last} background",
                    )
                )
                .replace("  ", " ")
                .strip()
            )
        case "checks":
            checked = rng.choice(("checked", "checkered", "checkerboard"))
            return rng.choice(
                (
                    f"{first} and {last} {checked} background",
                    f"{checked} {first} and {last} background",
                    f"{checked} background in {first} and {last}",
                )
            )


def _figures_text(scene: Scene, rng: random.Random, terse: bool) -> str:
    figures = scene.figures
    if scene.relation is not None:
        return _relation_text(scene.relation, figures, rng, terse)
    if len(figures) == 1:
        return _placed_text(figures[0], rng, terse)
    parts = [_placed_text(f, rng, terse) for f in figures]
    if any(f.place is not None for f in figures):
        order = list(range(len(parts)))
        rng.shuffle(order)
        parts = [parts[i] for i in order]
    if len(parts) == 2:
        return (
            f"{parts[0]} {rng.choice(('and', 'and', 'next to'))} {parts[1]}"
            if not any(f.place for f in figures)
            else f"{parts[0]} and {parts[1]}"
        )
    return f"{', '.join(parts[:-1])}{rng.choice((' and ', ', '))}{parts[-1]}"


def _placed_text(figure: Figure, rng: random.Random, terse: bool) -> str:
    text = figure_text(figure, rng, article=not terse)
    if figure.place is None:
        return text
    where = place_text(figure.place, rng)
    if terse:
        return f"{text}, {word(figure.place, rng)}" if rng.random() < 0.5 else f"{text} {where}"
    return f"{where}, {text}" if rng.random() < 0.15 else f"{text} {where}"


def _relation_text(
    relation: str, figures: tuple[Figure, ...], rng: random.Random, terse: bool
) -> str:
    one, two = (figure_text(f, rng, article=not terse) for f in figures)
    match relation:
        case "left of":
            return rng.choice(
                (
                    f"{one} to the left of {two}",
                    f"{one} left of {two}",
                    f"{one} on the left of {two}",
                    f"{two} to the right of {one}",
                    f"{two} right of {one}",
                    f"{two} on the right of {one}",
                    f"{one} on the left and {two} on the right",
                )
            )
        case "above":
            return rng.choice(
                (
                    f"{one} above {two}",
                    f"{one} over {two}",
                    f"{two} below {one}",
                    f"{two} under {one}",
                    f"{two} beneath {one}",
                    f"{one} at the top and {two} at the bottom",
                )
            )
        case "inside":
            return rng.choice(
                (
                    f"{two} inside {one}",
                    f"{two} inside of {one}",
                    f"{two} within {one}",
                    f"{one} around {two}",
                    f"{one} with {two} inside",
                    f"{one} containing {two}",
                )
            )
        case _:
            return rng.choice((f"{one} behind {two}", f"{two} in front of {one}"))


def _with_background(body: str, background: Background, rng: random.Random, terse: bool) -> str:
    text = background_text(background, rng)
    if terse:
        return f"{body}, {text}"
    style = rng.random()
    if style < 0.60:
        lead = rng.choice(("on", "on", "on", "against", "with"))
        return f"{body} {lead} {with_article(text)}"
    if style < 0.72:
        return f"on {with_article(text)}, {body}"
    if style < 0.84 and background.kind == "plain":
        return f"{body} on {word(background.colours[0], rng)}"
    if style < 0.92 and background.kind == "plain":
        return f"{body}, the background is {word(background.colours[0], rng)}"
    return f"{body}, {text}"
