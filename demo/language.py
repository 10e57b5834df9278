"""The words of the bundled model: what can be drawn, and how people call it.

Owns names, synonyms, colours and articles. Knows nothing of sentences or pixels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

Rgb = tuple[float, float, float]
"""sRGB, each channel from 0 to 1."""


def _hex(code: str) -> Rgb:
    red, green, blue = (int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return red, green, blue


COLOURS: Mapping[str, Rgb] = MappingProxyType(
    {
        "red": _hex("dc2828"),
        "green": _hex("28a03c"),
        "blue": _hex("2850dc"),
        "yellow": _hex("fad732"),
        "orange": _hex("f58c1e"),
        "purple": _hex("8232aa"),
        "pink": _hex("fa96be"),
        "brown": _hex("7d4b28"),
        "black": _hex("141414"),
        "white": _hex("fafafa"),
        "grey": _hex("878787"),
        "cyan": _hex("32c8d2"),
    }
)

SHAPES = (
    "circle",
    "square",
    "triangle",
    "rectangle",
    "diamond",
    "pentagon",
    "hexagon",
    "star",
    "heart",
    "cross",
    "ring",
    "crescent",
    "arrow",
    "oval",
)

SIZES = ("small", "medium", "large")

PLACES = (
    "center",
    "top left",
    "top",
    "top right",
    "left",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)

RELATIONS = ("left of", "above", "inside", "behind")
"""Each also has its converse: right of, below, around, in front of."""

SYNONYMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "red": ("crimson", "scarlet"),
        "green": ("emerald",),
        "blue": ("royal blue", "azure"),
        "yellow": ("golden", "lemon"),
        "orange": ("tangerine",),
        "purple": ("violet",),
        "pink": ("rose",),
        "brown": ("chocolate",),
        "black": ("jet black",),
        "white": ("snow white",),
        "grey": ("gray",),
        "cyan": ("turquoise", "aqua"),
        "circle": ("disc", "disk", "ball", "dot"),
        "square": ("box",),
        "diamond": ("rhombus",),
        "star": ("five-pointed star",),
        "heart": ("heart shape",),
        "cross": ("plus sign", "plus"),
        "ring": ("donut", "hoop"),
        "crescent": ("crescent moon", "moon"),
        "oval": ("ellipse",),
        "small": ("little", "tiny"),
        "medium": ("medium-sized", "mid-sized"),
        "large": ("big", "huge"),
        "center": ("middle", "centre"),
    }
)
SYNONYM_SHARE = 0.3
"""How often a word with synonyms is replaced by one of them."""


def word(name: str, rng: random.Random) -> str:
    """One of the words for a shape, colour, size or place."""
    others = SYNONYMS.get(name, ())
    return rng.choice(others) if others and rng.random() < SYNONYM_SHARE else name


def with_article(phrase: str) -> str:
    """``a`` or ``an`` before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
