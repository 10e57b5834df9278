"""Which way of showing pictures a terminal understands.

A terminal's own answer counts first, its environment second: variables are inherited
by terminals that are started from another. Decides; asks nobody itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from app.cli.terminal.query import Answers
from app.cli.terminal.tmux import Tmux

AUTO = "auto"
TMUX_REMEDY = (
    "tmux keeps pictures from the terminal; 'tmux set -g allow-passthrough on' lets them "
    "through (shown in coloured blocks)"
)
NO_PICTURES = "this terminal shows no pictures (shown in coloured blocks)"
# Understand no question, and show what they do not understand.
_MUTE = frozenset({"dumb", "linux", "unknown", ""})


class Graphics(StrEnum):
    """A way to show pictures."""

    KITTY = "kitty"
    ITERM2 = "iterm2"
    SIXEL = "sixel"
    BLOCKS = "blocks"


GRAPHICS_NAMES = (AUTO, *Graphics)

# What a terminal's name or TERM begins with, and what it shows best. Terminals that are not
# here are taken by their answers.
_BY_NAME = {
    "kitty": Graphics.KITTY,
    "xterm-kitty": Graphics.KITTY,
    "ghostty": Graphics.KITTY,
    "xterm-ghostty": Graphics.KITTY,
    "konsole": Graphics.KITTY,
    # Its support of kitty's protocol is younger and off in some versions.
    "wezterm": Graphics.ITERM2,
    "iterm2": Graphics.ITERM2,
    "mintty": Graphics.ITERM2,
    "foot": Graphics.SIXEL,
    "mlterm": Graphics.SIXEL,
    "contour": Graphics.SIXEL,
}
_KITTY_VERSION = re.compile(r"kitty\D*(\d+)\.(\d+)")
_FIRST_KITTY_WITH_PLACEHOLDERS = (0, 28)
# Variables that terminals set, and what they show then.
_BY_VARIABLE = {
    "KITTY_WINDOW_ID": Graphics.KITTY,
    "GHOSTTY_RESOURCES_DIR": Graphics.KITTY,
    "KONSOLE_VERSION": Graphics.KITTY,
    "WEZTERM_PANE": Graphics.ITERM2,
    "ITERM_SESSION_ID": Graphics.ITERM2,
}
_BY_PROGRAM = {
    "ghostty": Graphics.KITTY,
    "WezTerm": Graphics.ITERM2,
    "iTerm.app": Graphics.ITERM2,
    "iTerm2": Graphics.ITERM2,
    "mintty": Graphics.ITERM2,
}
# The first version of Konsole with the protocol is 22.04.
_FIRST_KONSOLE = 220400


@dataclass(frozen=True, slots=True)
class Found:
    """What to show pictures with.

    Attributes:
        graphics: None where not even colours are understood.
        is_wrapped: sequences must be wrapped for tmux.
        has_placeholders: the terminal puts pictures where characters stand for them.
        note: what the person could change to see more.
    """

    graphics: Graphics | None
    is_wrapped: bool = False
    has_placeholders: bool = False
    note: str | None = None


def can_be_asked(environment: Mapping[str, str]) -> bool:
    """Whether the terminal takes questions without showing them."""
    return (
        environment.get("TERM", "") not in _MUTE
        and environment.get("TERM_PROGRAM") != "Apple_Terminal"
    )


def is_multiplexed(environment: Mapping[str, str]) -> bool:
    """Whether tmux or screen stands between this process and the terminal."""
    return environment.get("TERM", "").startswith(("tmux", "screen"))


def choose(environment: Mapping[str, str], answers: Answers, tmux: Tmux | None) -> Found:
    """The best way of showing pictures here."""
    if environment.get("TERM", "") in _MUTE:
        return Found(None)
    if tmux is not None:
        return _inside_tmux(answers, tmux)
    named = by_name(answers.name)
    if named is Graphics.KITTY and not answers.has_kitty:
        named = None
    if named is not None:
        return Found(named)
    if answers.has_kitty:
        return Found(Graphics.KITTY)
    if answers.name is None and (known := _by_environment(environment)) is not None:
        return Found(known)
    if answers.has_sixel:
        return Found(Graphics.SIXEL)
    return Found(Graphics.BLOCKS, note=NO_PICTURES)


def as_named(graphics: Graphics, found: Found, tmux: Tmux | None) -> Found:
    """The way that the person named, as it works here."""
    if graphics is found.graphics:
        return found
    is_wrapped = tmux is not None and graphics is not Graphics.BLOCKS
    return Found(graphics, is_wrapped=is_wrapped)


def by_name(name: str | None) -> Graphics | None:
    """What a terminal of that name shows best; None for an unknown one."""
    lowered = (name or "").lower()
    for start, graphics in _BY_NAME.items():
        if lowered.startswith(start):
            return graphics
    return None


def _inside_tmux(answers: Answers, tmux: Tmux) -> Found:
    name = tmux.outer_name if by_name(tmux.outer_name) else tmux.outer_term
    outer = by_name(name)
    if tmux.lets_through and _has_placeholders(name):
        return Found(outer, is_wrapped=True, has_placeholders=True)
    if answers.has_sixel:
        # tmux itself takes them, and moves them with the text.
        return Found(Graphics.SIXEL)
    if outer is None:
        return Found(Graphics.BLOCKS, note=NO_PICTURES)
    if not tmux.lets_through:
        return Found(Graphics.BLOCKS, note=TMUX_REMEDY)
    return Found(outer, is_wrapped=True)


def _has_placeholders(name: str) -> bool:
    """Whether a terminal of that name shows pictures where characters stand for them."""
    version = _KITTY_VERSION.search(name)
    if version is not None:
        return (int(version[1]), int(version[2])) >= _FIRST_KITTY_WITH_PLACEHOLDERS
    return "ghostty" in name.lower()


def _by_environment(environment: Mapping[str, str]) -> Graphics | None:
    named = by_name(environment.get("TERM"))
    if named is not None:
        return named
    for variable in ("TERM_PROGRAM", "LC_TERMINAL"):
        if (known := _BY_PROGRAM.get(environment.get(variable, ""))) is not None:
            return known
    for variable, graphics in _BY_VARIABLE.items():
        value = environment.get(variable)
        if value and (variable != "KONSOLE_VERSION" or _is_new_konsole(value)):
            return graphics
    return None


def _is_new_konsole(version: str) -> bool:
    return version.isdigit() and int(version) >= _FIRST_KONSOLE
