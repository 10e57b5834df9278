"""``fluxd generate`` on a terminal that answers: what is asked, told and shown in the end."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.service.conftest import PATIENCE_S, StartLive
from tests.service.fake_pipeline import FakePipeline
from tests.service.processes import FLUXD, environment
from tests.service.terminal.emulator import Emulator
from tests.service.terminal.test_detect import ANSWERS
from tests.service.terminal.test_graphics import same

pty = pytest.importorskip("pty")
LAST_QUESTION = b"\x1b[c"
# Makes the terminal on standard input the one that /dev/tty is.
OWNING = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def run_on_terminal(
    answer: bytes, place: Path, *arguments: str, until: bytes | None = None
) -> bytes:
    """All that a run of fluxd writes to a terminal that answers in this way.

    Args:
        until: Ctrl-C is pressed once this is written.
    """
    import fcntl
    import termios

    theirs, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    kept = ("TMUX", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "COLORTERM")
    around = environment(TERM="xterm-256color")
    with subprocess.Popen(
        [sys.executable, "-c", OWNING, *FLUXD, *arguments],
        cwd=place,
        env={name: value for name, value in around.items() if name not in kept},
        stdin=ours,
        stdout=ours,
        stderr=ours,
    ) as process:
        os.close(ours)
        written, answered = b"", 0
        try:
            while True:
                try:
                    part = os.read(theirs, 65536)
                except OSError:
                    break
                if not part:
                    break
                written += part
                if written.count(LAST_QUESTION) > answered:
                    answered += 1
                    os.write(theirs, answer)
                if until is not None and until in written:
                    os.write(theirs, b"\x03")
                    until = None
            assert process.wait(PATIENCE_S) == 0, written
        finally:
            process.kill()
            os.close(theirs)
    return written


@pytest.mark.parametrize("name", ["kitty", "wezterm", "foot"])
def test_the_steps_and_the_picture_are_shown_in_one_place(
    start_live: StartLive, tmp_path: Path, name: str
) -> None:
    live = start_live(FakePipeline(slice_s_at_512=0.1))
    said = run_on_terminal(
        ANSWERS[name],
        tmp_path,
        *("generate", "a fox", "--show-steps", "--server", live.url),
        *("--width", "512", "--height", "320", "-o", "fox.png"),
    )
    assert b"drawing step 1 of 4" in said and b"left" in said
    _, _, shown = said.rpartition(LAST_QUESTION)
    terminal = Emulator()
    terminal.feed(shown)
    rows = {placed.row for placed in terminal.placed}
    assert len(rows) == 1
    # The steps, unless the terminal itself puts one in the place of another.
    assert len(terminal.placed) == (1 if name == "kitty" else 4)
    with Image.open(tmp_path / "fox.png") as picture:
        last = terminal.placed[-1].picture
        if last.height >= picture.height:
            assert same(last, picture.convert("RGB"))
        assert last.convert("RGB").getpixel((9, 9)) == picture.getpixel((9, 9))
    text = [terminal.line(row) for row in range(40)]
    assert any(line.startswith("fox.png  512x320  seed ") for line in text)
    # Nothing of the bar is left.
    assert not any("drawing" in line for line in text)


def test_serve_tells_how_it_gets_ready_below_its_log(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = run_on_terminal(
        b"", tmp_path, "serve", "--model", str(tiny_checkpoint), "--port", "0", until=b"ready"
    )
    assert b"starting" in said and b"warming up" in said
    # Wide enough for every line: they are not to be cut.
    terminal = Emulator(columns=1000)
    terminal.feed(said.replace(b"^C", b""))
    lines = [line for row in range(40) if (line := terminal.line(row))]
    # The log alone is left, each line whole.
    assert re.fullmatch(r"[\d:]{8} INFO    listening on http://127.0.0.1:\d+", lines[0])
    assert all(re.match(r"[\d:]{8} INFO ", line) for line in lines), lines
    assert lines[-1].endswith("ended")
