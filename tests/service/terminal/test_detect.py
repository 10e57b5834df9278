"""Which way of showing pictures is taken, by what terminals really answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.cli.terminal import query
from app.cli.terminal.detect import TMUX_REMEDY, Graphics, can_be_asked, choose
from app.cli.terminal.query import Answers, ask_terminal, cursor_place
from app.cli.terminal.tmux import Tmux, wrapped

OK = b"\x1b_Gi=31;OK\x1b\\"
ANSWERS = {
    "kitty": OK + b"\x1bP>|kitty(0.35.2)\x1b\\\x1b[6;36;17t\x1b[?62;c",
    "ghostty": OK + b"\x1bP>|ghostty 1.1.3\x1b\\\x1b[6;34;16t\x1b[?62;22c",
    "konsole": OK + b"\x1bP>|Konsole 22.12.3\x1b\\\x1b[6;17;9t\x1b[?62;1;4c",
    "wezterm": OK + b"\x1bP>|WezTerm 20240203-110809\x1b\\\x1b[6;20;9t\x1b[?65;4;6;18;22c",
    "iterm2": OK + b"\x1bP>|iTerm2 3.6.2\x1b\\\x1b[6;34;16t\x1b[?64;1;2;4;6;17;18;21;22;52c",
    "foot": b"\x1bP>|foot(1.16.2)\x1b\\\x1b[6;19;8t\x1b[?62;4;22c\x1b[?1;0;1024S\x1b[?62;4;22c",
    "xterm vt340": b"\x1bP>|XTerm(379)\x1b\\\x1b[6;13;6t\x1b[?63;1;2;4;6;9;15;22c",
    "xterm": b"\x1bP>|XTerm(379)\x1b\\\x1b[6;13;6t\x1b[?64;1;2;6;9;15;16;17;18;21;22;28c",
    "gnome-terminal": b"\x1bP>|VTE(7600)\x1b\\\x1b[?65;1;9c",
    "windows terminal": b"\x1b[6;20;10t\x1b[?61;4;6;7;14;21;22;23;24;28;32;42c",
}
SHOWN_AS = {
    "kitty": Graphics.KITTY,
    "ghostty": Graphics.KITTY,
    "konsole": Graphics.KITTY,
    "wezterm": Graphics.ITERM2,
    "iterm2": Graphics.ITERM2,
    "foot": Graphics.SIXEL,
    "xterm vt340": Graphics.SIXEL,
    "xterm": Graphics.BLOCKS,
    "gnome-terminal": Graphics.BLOCKS,
    "windows terminal": Graphics.SIXEL,
}
PLAIN = {"TERM": "xterm-256color"}


def in_tmux(name: str, term: str = "", *, lets_through: bool = True) -> Tmux:
    return Tmux(name, term, None, lets_through)


@pytest.mark.parametrize("terminal", ANSWERS)
def test_a_terminal_is_taken_by_its_answers(terminal: str) -> None:
    answers = Answers.parse(ANSWERS[terminal])
    assert answers.has_answered
    # Variables of the terminal that this one was started from do not count.
    inherited = {**PLAIN, "KITTY_WINDOW_ID": "1"} if answers.name else PLAIN
    found = choose(inherited, answers, None)
    assert found.graphics is SHOWN_AS[terminal]
    assert (found.note is not None) == (found.graphics is Graphics.BLOCKS)


def test_cells_and_colours_are_read() -> None:
    assert Answers.parse(ANSWERS["kitty"]).cell_px == (17, 36)
    assert Answers.parse(ANSWERS["foot"]).colours == 1024
    assert Answers.parse(b"\x1b[6;0;0t\x1b[?1;0;0S\x1b[?6c") == Answers(has_answered=True)


@pytest.mark.parametrize(
    ("environment", "graphics"),
    [
        ({"TERM": "xterm-kitty"}, Graphics.KITTY),
        ({"TERM": "xterm-ghostty"}, Graphics.KITTY),
        ({**PLAIN, "TERM_PROGRAM": "ghostty"}, Graphics.KITTY),
        ({**PLAIN, "TERM_PROGRAM": "WezTerm"}, Graphics.ITERM2),
        ({**PLAIN, "TERM_PROGRAM": "iTerm.app"}, Graphics.ITERM2),
        ({**PLAIN, "LC_TERMINAL": "iTerm2"}, Graphics.ITERM2),
        ({**PLAIN, "KITTY_WINDOW_ID": "1"}, Graphics.KITTY),
        ({**PLAIN, "KONSOLE_VERSION": "221203"}, Graphics.KITTY),
        ({**PLAIN, "KONSOLE_VERSION": "211203"}, Graphics.BLOCKS),
        ({"TERM": "foot"}, Graphics.SIXEL),
        (PLAIN, Graphics.BLOCKS),
        ({"TERM": "dumb"}, None),
        ({}, None),
    ],
)
def test_a_terminal_that_does_not_answer_is_taken_by_its_environment(
    environment: dict[str, str], graphics: Graphics | None
) -> None:
    assert choose(environment, Answers(), None).graphics is graphics


@pytest.mark.parametrize(
    ("tmux", "graphics", "has_placeholders"),
    [
        (in_tmux("kitty(0.35.2)"), Graphics.KITTY, True),
        (in_tmux("kitty(0.26.5)"), Graphics.KITTY, False),
        (in_tmux("ghostty 1.1.3"), Graphics.KITTY, True),
        (in_tmux("", "xterm-ghostty"), Graphics.KITTY, True),
        (in_tmux("Konsole 22.12.3"), Graphics.KITTY, False),
        (in_tmux("WezTerm 20240203"), Graphics.ITERM2, False),
        (in_tmux("iTerm2 3.5.0"), Graphics.ITERM2, False),
        (in_tmux("foot(1.16.2)"), Graphics.SIXEL, False),
    ],
)
def test_inside_tmux_the_terminal_around_it_counts(
    tmux: Tmux, graphics: Graphics, has_placeholders: bool
) -> None:
    found = choose({"TERM": "tmux-256color"}, Answers.parse(b"\x1b[?1;2c"), tmux)
    assert (found.graphics, found.is_wrapped) == (graphics, True)
    assert found.has_placeholders is has_placeholders


def test_a_tmux_that_lets_nothing_through_is_told_how() -> None:
    inside = {"TERM": "tmux-256color"}
    closed = in_tmux("kitty(0.35.2)", lets_through=False)
    found = choose(inside, Answers.parse(b"\x1b[?1;2c"), closed)
    assert (found.graphics, found.note) == (Graphics.BLOCKS, TMUX_REMEDY)
    # One that takes sixel pictures itself needs no such thing.
    own = choose(inside, Answers.parse(b"\x1b[?1;2;4c"), in_tmux("XTerm(379)", lets_through=False))
    assert (own.graphics, own.is_wrapped) == (Graphics.SIXEL, False)


def test_terminals_that_would_show_the_question_are_not_asked() -> None:
    assert can_be_asked(PLAIN)
    for environment in ({"TERM": "dumb"}, {"TERM": "linux"}, {}):
        assert not can_be_asked(environment)
    assert not can_be_asked({**PLAIN, "TERM_PROGRAM": "Apple_Terminal"})


def test_a_wrapped_sequence_hides_its_escapes() -> None:
    assert wrapped(b"\x1b_Ga=T\x1b\\") == b"\x1bPtmux;\x1b\x1b_Ga=T\x1b\x1b\\\x1b\\"


@contextmanager
def terminal(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A terminal at the other end of the line that answers one question."""
    pty = pytest.importorskip("pty")
    theirs, ours = pty.openpty()
    name = os.ttyname(ours)
    opened = os.open
    monkeypatch.setattr(
        query.os, "open", lambda path, *rest: opened(name if path == "/dev/tty" else path, *rest)
    )
    asked: list[bytes] = []

    def run() -> None:
        while not asked or not asked[-1].endswith(b"\x1b[c"):
            asked.append(os.read(theirs, 4096))
        os.write(theirs, answer)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield asked
    thread.join(10)
    os.close(theirs)
    os.close(ours)


def test_a_terminal_is_asked_on_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(ANSWERS["ghostty"], monkeypatch) as asked:
        answers = ask_terminal(timeout_s=30)
    assert answers == Answers.parse(ANSWERS["ghostty"])
    assert b"".join(asked).startswith(query.IS_KITTY)


def test_tmux_is_not_asked_what_it_takes_for_a_title(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(b"\x1b[?1;2c", monkeypatch) as asked:
        assert ask_terminal(is_multiplexed=True, timeout_s=30).has_answered
    assert b"\x1b_G" not in b"".join(asked)


def test_a_terminal_that_keeps_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(b"", monkeypatch):
        assert ask_terminal(timeout_s=0.05) == Answers()


def test_a_process_without_a_terminal_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(6, "No such device or address")

    monkeypatch.setattr(query.os, "open", refuse)
    assert ask_terminal() == Answers() and cursor_place() is None
