"""Through tmux to the terminal around it.

tmux keeps what it does not know from the terminal, unless it is wrapped and the
option ``allow-passthrough`` is on. What passes is not tmux's own: it does not move
with the text, so it must be put at its place on the whole terminal.

Source: tmux(1), "allow-passthrough"; tmux's FAQ on passthrough.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

# tmux throws longer sequences away.
MAX_SEQUENCE_BYTES = 1_000_000
TIMEOUT_S = 5.0
_FIELDS = (
    "client_termtype",
    "client_termname",
    "client_cell_width",
    "client_cell_height",
    "version",
)


@dataclass(frozen=True, slots=True)
class Tmux:
    """The tmux that this process runs in.

    Attributes:
        outer_name: what the terminal around it calls itself; may be empty.
        outer_term: the same terminal's TERM.
        cell_px: width and height of a character cell of that terminal.
        lets_through: whether wrapped sequences reach it.
    """

    outer_name: str
    outer_term: str
    cell_px: tuple[int, int] | None
    lets_through: bool


def find_tmux(environment: Mapping[str, str]) -> Tmux | None:
    """The tmux around this process; None where there is none, or it does not answer."""
    if not environment.get("TMUX"):
        return None
    pane = environment.get("TMUX_PANE", "")
    target = ["-t", pane] if pane else []
    told = _tmux("display-message", *target, "-p", "\t".join(f"#{{{name}}}" for name in _FIELDS))
    if told is None:
        return None
    name, term, width, height, version = told.split("\t")
    # Before 3.3 there was no such option, and everything passed.
    allowed = _tmux("show-options", *target, "-Apqv", "allow-passthrough") or ""
    is_old = version.replace("next-", "").startswith(("1.", "2.", "3.0", "3.1", "3.2"))
    return Tmux(
        outer_name=name,
        outer_term=term,
        cell_px=_cell(width, height),
        lets_through=allowed in ("on", "all") or (not allowed and is_old),
    )


def pane_origin(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """How many rows and columns of the terminal lie above and left of this pane."""
    pane = environment.get("TMUX_PANE", "")
    target = ["-t", pane] if pane else []
    fields = "#{pane_top}\t#{pane_left}\t#{status}\t#{status-position}"
    told = _tmux("display-message", *target, "-p", fields)
    if told is None:
        return None
    top, left, status, position = told.split("\t")
    lines = 0
    if position == "top" and status != "off":
        lines = int(status) if status.isdigit() else 1
    return int(top) + lines, int(left)


def wrapped(sequence: bytes) -> bytes:
    """A sequence as tmux lets it through."""
    return b"\x1bPtmux;" + sequence.replace(b"\x1b", b"\x1b\x1b") + b"\x1b\\"


def at_place(sequence: bytes, row: int, column: int) -> bytes:
    """A wrapped sequence that is carried out at a place of the whole terminal, from 1."""
    return wrapped(b"\x1b7\x1b[%d;%dH" % (row, column) + sequence + b"\x1b8")


def _cell(width: str, height: str) -> tuple[int, int] | None:
    if width.isdigit() and height.isdigit() and int(width) and int(height):
        return int(width), int(height)
    return None


def _tmux(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["tmux", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")
