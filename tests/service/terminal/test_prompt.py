"""The interactive prompt: what lines mean, and what they do with a real tiny model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from app.cli.drawing import DrawingError
from app.cli.drawing.local import LocalArtist
from app.cli.prompt.commands import COMMANDS, help_text
from app.cli.prompt.completion import LineCompleter
from app.cli.prompt.editor import Editor, history_path
from app.cli.prompt.parsing import LAST, Call, LineError, Wish, parse_line
from app.cli.prompt.session import Session
from app.cli.terminal.detect import Found, Graphics
from app.cli.terminal.screen import Screen, Terminal
from app.settings import Settings
from fluxcore import FluxPipeline
from tests.service.terminal.emulator import Emulator
from tests.service.terminal.test_graphics import CELL, Output


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("  a fox ", Wish("a fox")),
        ("512x768 a fox", Wish("a fox", (512, 768))),
        ("512×768 a fox", Wish("a fox", (512, 768))),
        ("$ make it red", Wish("make it red", None, (LAST,))),
        ("$0 $3 256x256 $ mix", Wish("mix", (256, 256), (0, 3, LAST))),
        ("a $5 bill of 10x10", Wish("a $5 bill of 10x10")),
        ("\\$5 bill", Wish("$5 bill")),
        ("$5, please", Wish("$5, please")),
        ("$" + "9" * 5000, Wish("$" + "9" * 5000)),
        ("!Seed  42", Call("seed", "42")),
        ("!help", Call("help", "")),
        ("", None),
    ],
)
def test_a_line_means(line: str, meaning: object) -> None:
    assert parse_line(line) == meaning


@pytest.mark.parametrize(
    ("line", "says"),
    [("500x500 a fox", "multiple of 16"), ("512x512", "say what to draw"), ("$", "say what")],
)
def test_a_line_that_makes_no_sense_is_told_what_would(line: str, says: str) -> None:
    with pytest.raises(LineError, match=says):
        parse_line(line)


class Talk:
    """A session, and what is said and shown in it."""

    def __init__(
        self, session: Session, output: Output, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.session = session
        self._output = output
        self._capsys = capsys
        self.terminal = Emulator(rows=400)

    def __call__(self, line: str) -> str:
        self._capsys.readouterr()
        self.session.obey(line)
        self.terminal.feed(self._output.bytes())
        return self._capsys.readouterr().err

    @property
    def last_shown(self) -> Image.Image:
        return self.terminal.placed[-1].picture


@pytest.fixture
def talk(
    tiny_pipeline: FluxPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Talk]:
    """A session around a model that is loaded, on a terminal that shows pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "app.cli.drawing.local.pipeline_loader", lambda *_: lambda progress: tiny_pipeline
    )
    settings = Settings(default_width=64, default_height=64)
    artist = LocalArtist(settings, is_warmed=False)
    output = Output()
    screen = Screen(output, Terminal(Found(Graphics.KITTY), CELL))
    yield Talk(Session(artist, screen, settings), output, capsys)
    artist.close()


def test_pictures_are_drawn_numbered_shown_and_saved(talk: Talk) -> None:
    assert talk("!seed 7") == "default size, seed 7\n"
    assert talk("a fox").startswith("$0  64x64  seed 7  ")
    first = talk.last_shown
    assert talk("128x64 a fox").startswith("$1  128x64  seed 7  ")
    # The size of a line is for that line.
    assert talk("a fox").startswith("$2  64x64  seed 7  ")
    assert talk.last_shown.tobytes() == first.tobytes()
    assert len(talk.session.gallery.unsaved) == 3
    assert talk("!save fox.png") == "$2 saved as fox.png\n"
    assert "fox.png is there already" in talk("!save $0 fox.png")
    assert talk("!save all") == "$0 saved as fluxd-7.png\n$1 saved as fluxd-7-2.png\n"
    assert not talk.session.gallery.unsaved
    with Image.open("fluxd-7.png") as saved:
        assert "Seed: 7" in saved.text["parameters"]
    assert Path("fluxd-7.png").read_bytes() == Path("fox.png").read_bytes()


def test_pictures_are_references_of_others(talk: Talk, tmp_path: Path) -> None:
    talk("!seed 7")
    Image.effect_noise((96, 80), 60).convert("RGB").save(tmp_path / "noise.jpg")
    assert talk("!load noise.jpg") == "$0  96x80  noise.jpg\n"
    assert "cannot read absent.png" in talk("!load absent.png")
    # Without a size of its own a picture has its first reference's.
    assert talk("$ a fox").startswith("$1  96x80  ")
    assert talk("$0 $1 a fox").startswith("$2  96x80  ")
    assert talk("64x64 $0 a fox").startswith("$3  64x64  ")
    assert talk("64x64 a fox").startswith("$4  64x64  ")
    data = [kept.picture.tobytes() for kept in talk.session.gallery]
    assert len(set(data)) == 5
    assert talk("$9 a fox") == "there is no $9; the pictures are $0 to $4\n"
    assert talk("!save $0 loaded.png") == "$0 saved as loaded.png\n"
    with Image.open("loaded.png") as loaded:
        assert (loaded.format, loaded.size) == ("PNG", (96, 80))


def test_choices_hold_until_they_are_changed(talk: Talk) -> None:
    assert talk("!size 128x64") == "128x64, seed random\n"
    assert talk("!steps 2") == "128x64, seed random, 2 steps\n"
    assert talk("!schedule power 3") == "128x64, seed random, 2 steps, power 3\n"
    assert talk("!guidance 3.5").endswith("2 steps, guidance 3.5, power 3\n")
    said = talk("a fox")
    assert said.startswith("$0  128x64  seed ")
    assert "warning: guidance has no effect on a distilled model" in said
    for line in ("!size default", "!steps default", "!guidance default", "!schedule flux"):
        said = talk(line)
    assert said == "default size, seed random\n"
    for line, says in {
        "!seed x": "whole number",
        "!seed -1": "seed must be from 0",
        "!steps 0": "steps must be from 1",
        "!guidance 99": "guidance must be from 0 to 30",
        "!schedule fast": "schedule must be one of flux, linear, power",
        "!schedule linear 2": "only power",
        "!size 500x500": "multiple of 16",
        "!sede 3": "did you mean 'seed'?",
        "!explore 1": "2 to 36",
        "!explore 4": "draw something first",
        "!save sheet": "there is no sheet yet",
        "!save x.gif": "there is no picture yet" if not len(talk.session.gallery) else ".png",
    }.items():
        if line == "!explore 4":
            talk.session.last_wish = None
        assert says in talk(line), line
    assert talk.session.choices.described() == "default size, seed random"


def test_variations_are_a_sheet_of_pictures(talk: Talk) -> None:
    talk("!seed 7")
    said = talk("!explore 11 a fox")
    assert re.findall(r"\$(\d+)  64x64  seed (\d+)", said) == [
        (str(i), str(7 + i)) for i in range(11)
    ]
    # The eleventh, of another job, is what its seed alone draws.
    talk("!seed 17")
    talk("a fox")
    pictures = list(talk.session.gallery)
    assert pictures[11].data == pictures[10].data
    assert talk("!save sheet all.png") == "the sheet saved as all.png\n"
    with Image.open("all.png") as sheet:
        # 4 columns, 3 rows, 4 pixels between.
        assert sheet.size == (4 * 68 - 4, 3 * 68 - 4)
        corner = sheet.crop((68 + 40, 40, 68 + 64, 64))
        assert corner.tobytes() == pictures[1].picture.crop((40, 40, 64, 64)).tobytes()
    assert len(talk("!explore 2").splitlines()) == 3


def test_pictures_are_listed_and_shown_again(talk: Talk) -> None:
    assert talk("!list") == "no pictures yet\n"
    assert "there is no picture yet" in talk("!show")
    talk("!seed 7")
    talk("a fox")
    talk("128x64 two foxes")
    assert talk("!list") == "$0  64x64  seed 7  a fox\n$1  128x64  seed 7  two foxes\n"
    before = len(talk.terminal.placed)
    assert talk("!show $0 $1").count("\n") == 2
    assert len(talk.terminal.placed) == before + 2


def test_ctrl_c_cancels_the_picture_and_nothing_else(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    import app.cli.onlooker as onlooker

    shown = onlooker.Onlooker.show

    def interrupted(self: onlooker.Onlooker, stage: str, *rest: object, **named: object) -> None:
        shown(self, stage, *rest, **named)  # type: ignore[arg-type]
        if stage == "drawing":
            raise KeyboardInterrupt

    monkeypatch.setattr(onlooker.Onlooker, "show", interrupted)
    assert talk("a fox") == "cancelled\n"
    monkeypatch.setattr(onlooker.Onlooker, "show", shown)
    assert talk("a fox").startswith("$0  ")


def test_help_names_all_commands_and_quit_leaves(talk: Talk) -> None:
    said = talk("!help")
    assert said == help_text() + "\n"
    assert all(f"!{name}" in said for name in COMMANDS)
    with pytest.raises(EOFError):
        talk("!quit")


def completions(session: Session, text: str) -> list[str]:
    completer = LineCompleter(session.gallery)
    return [one.text for one in completer.get_completions(Document(text), CompleteEvent())]


def test_tab_offers_what_may_follow(talk: Talk, tmp_path: Path) -> None:
    talk("!seed 7")
    talk("a fox")
    talk("a fox")
    session = talk.session
    assert completions(session, "!s") == ["!seed", "!size", "!steps", "!schedule", "!show", "!save"]
    assert completions(session, "!schedule li") == ["linear"]
    assert completions(session, "$") == completions(session, "$0 $") == ["$1", "$0"]
    assert completions(session, "!show $1") == ["$1"]
    assert completions(session, "a fox $") == completions(session, "a fo") == []
    (tmp_path / "noise.png").write_bytes(b"")
    assert completions(session, "!load no") == ["ise.png"]


def test_a_photo_is_shown_and_saved_upright_in_any_colours(talk: Talk) -> None:
    lying = Image.Exif()
    lying[0x0112] = 6
    Image.new("CMYK", (96, 80)).save("photo.jpg", exif=lying)
    assert talk("!load photo.jpg") == "$0  80x96  photo.jpg\n"
    assert talk("!save $0 photo.png") == "$0 saved as photo.png\n"
    with Image.open("photo.png") as saved:
        assert (saved.size, saved.mode) == ((80, 96), "RGB")
    assert talk.session.gallery.find(0).picture.size == (80, 96)


@pytest.mark.parametrize("command", ["load", "save"])
@pytest.mark.parametrize("name", ["~nobody-of-that-name/fox.png", "a\0b.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(talk: Talk, command: str, name: str) -> None:
    talk.session.gallery.add(b"", "a fox", 1, (64, 64))
    assert talk(f"!{command} {name}").startswith("no file can have the name ")


def test_pictures_can_be_saved_when_nothing_can_be_drawn_any_more(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.prompt.editor.user_state_path", lambda *_, **__: tmp_path)
    talk("a fox")
    talk.session.artist.close()
    with create_pipe_input() as keys, create_app_session(keys, DummyOutput()):
        editor = Editor(talk.session)
        keys.send_text("!save all\r")
        assert editor.read() == "!save all"
        talk("!save all")
        with pytest.raises(DrawingError, match="cannot be used any more"):
            editor.read()


def test_lines_are_remembered_for_their_user_only(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "app.cli.prompt.editor.user_state_path", lambda *_, **__: tmp_path / "state"
    )
    Editor(talk.session)
    path = history_path()
    assert path.parent == tmp_path / "state"
    assert path.stat().st_mode & 0o777 == 0o600
