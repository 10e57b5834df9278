"""The prompt and ``generate`` in tmux, used as a person would."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.service.conftest import PATIENCE_S
from tests.service.processes import environment

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
FLUXD_LINE = str(Path(sys.executable).parent / "fluxd")

LOOK_EVERY_S = 0.1


class Pane:
    """One window of a tmux of its own."""

    def __init__(self, place: Path) -> None:
        self._socket = str(place / "tmux")
        self._place = place

    def start(self, line: str) -> None:
        """Open it with a command, whose exit status is told at the end."""
        # Ctrl-C is for the command, as it is from an interactive shell.
        shell = f"trap : INT; {line}; echo ended with $?; sleep {PATIENCE_S:.0f}"
        size = ("-x", "100", "-y", "40")
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, "sh", "-c", shell)

    def type(self, *keys: str) -> None:
        """Press keys, named as tmux names them."""
        self._tmux("send-keys", *keys)

    def enter(self, line: str) -> None:
        """Type a line."""
        self._tmux("send-keys", "-l", line)
        self.type("Enter")

    def shown(self, *more: str) -> str:
        """What is on it, and above."""
        return self._tmux("capture-pane", "-p", "-S", "-", *more)

    def wait_for(self, pattern: str) -> str:
        """Wait until something is on it; tells what."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.shown())) is None:
            assert time.monotonic() < deadline_s, f"{pattern!r} did not come:\n{self.shown()}"
            time.sleep(LOOK_EVERY_S)
        return found[0]

    def close(self) -> None:
        """End all that runs in it."""
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=False)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *arguments],
            cwd=self._place,
            env=environment(
                TERM="xterm-256color", XDG_STATE_HOME=str(self._place), FLUXD_DEVICE="cpu"
            ),
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        )
        return done.stdout


@pytest.fixture
def pane(tmp_path: Path) -> Iterator[Pane]:
    opened = Pane(tmp_path)
    yield opened
    opened.close()


def test_a_person_draws_in_the_prompt(pane: Pane, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pane.start(f"{FLUXD_LINE} --model {tiny_checkpoint}")
    pane.wait_for(r"Type what to draw; !help tells more")
    pane.wait_for(r"fluxd>")
    pane.wait_for(r"tiny on cpu, default size, seed random")

    pane.enter("64x64 a fox")
    pane.wait_for(r"\$0  64x64  seed \d+")
    assert "▀▀▀▀" in pane.shown() and "\x1b[" in pane.shown("-e")

    # Tab completes what is the only one, Up brings an earlier line back.
    pane.type("!", "s", "c", "h", "Tab")
    pane.wait_for(r"fluxd> !schedule")
    pane.enter(" linear")
    pane.wait_for(r"default size, seed random, linear\n")
    pane.type("Up", "Up")
    pane.wait_for(r"(?s)fluxd> 64x64 a fox\n.*fluxd> 64x64 a fox\n")
    pane.type("Enter")
    pane.wait_for(r"\$1  64x64  seed \d+")
    pane.enter("64x64 $0 $ mixed")
    pane.wait_for(r"\$2  64x64  seed \d+")

    pane.enter("!steps 200")
    pane.wait_for(r"200 steps, linear\n")
    pane.enter("1024x1024 never done")
    pane.wait_for(r"drawing step \d+ of 200 .* left")
    pane.type("C-c")
    pane.wait_for(r"cancelled\n")
    pane.enter("!steps default")
    pane.enter("64x64 another")
    pane.wait_for(r"\$3  64x64  seed \d+")

    pane.enter("!save $0 fox.png")
    pane.wait_for(r"\$0 saved as fox.png")
    with Image.open(tmp_path / "fox.png") as saved:
        assert saved.size == (64, 64)
    pane.type("C-d")
    pane.wait_for(r"3 pictures are not saved")
    pane.type("C-d")
    pane.wait_for(r"ended with 0")
    lines = (tmp_path / "fluxd" / "prompt-history").read_text()
    assert "+64x64 a fox" in lines


def test_a_model_that_cannot_be_loaded_ends_the_prompt(pane: Pane, tmp_path: Path) -> None:
    pane.start(f"{FLUXD_LINE} --model absent")
    pane.wait_for(r"fluxd: .*absent.*")
    pane.wait_for(r"ended with 1")
    assert "Traceback" not in pane.shown()


def test_generate_shows_its_picture_in_tmux(
    pane: Pane, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """tmux itself shows none of ours; the person is told so, and sees blocks."""
    size = "--width 64 --height 64"
    pane.start(f"{FLUXD_LINE} generate 'a fox' --model {tiny_checkpoint} {size} --show-steps")
    pane.wait_for(r"shown in coloured blocks")
    pane.wait_for(r"ended with 0")
    shown = pane.shown()
    assert "out.png  64x64  seed" in shown
    # 16 rows of one picture: the steps before it had the same place.
    assert len(re.findall(r"^▀+$", shown, re.M)) == 16


def test_ctrl_c_ends_generate_at_once(pane: Pane, tiny_checkpoint: Path, tmp_path: Path) -> None:
    size = "--width 1024 --height 1024 --steps 200"
    pane.start(f"{FLUXD_LINE} generate 'a fox' --model {tiny_checkpoint} {size}")
    pane.wait_for(r"drawing step \d+ of 200 .* left")
    pane.type("C-c")
    pane.wait_for(r"fluxd: interrupted\nended with 130")
    assert not list(tmp_path.glob("*.png"))
