"""The command line: help, settings, drawing to files and pipes, and plain errors."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from app.cli import cli
from app.engine import Loader
from app.settings import Settings
from fluxcore import FluxPipeline
from fluxcore.version import __version__
from tests.service.processes import FLUXD, environment

PICTURE = Image.effect_noise((80, 64), 60).convert("RGB")


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside; relative names lie in a fresh directory."""
    for name in list(os.environ):
        if name.startswith("FLUXD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FLUXD_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that is loaded already: loading is tested once, drawing often."""

    def loader(directory: Path | None, settings: Settings) -> Loader:
        assert directory == Path("loaded")
        return lambda progress: tiny_pipeline

    monkeypatch.setattr("app.cli.drawing.local.pipeline_loader", loader)
    return "loaded"


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def draw(
    model: str, *arguments: object, prompt: str = "a red fox", stdin: str | None = None
) -> Result:
    size = () if "--image" in arguments else ("--width", 64, "--height", 64)
    return run("generate", prompt, "--model", model, *size, *arguments, stdin=stdin)


def test_help_lists_the_commands_and_loads_no_framework() -> None:
    code = (
        "import sys\n"
        "from app.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'fastapi', 'uvicorn', 'PIL'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    for command in (
        (),
        ("serve",),
        ("generate",),
        ("bench",),
        ("settings",),
        ("random-checkpoint",),
    ):
        shown = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert "Usage: fluxd" in shown.stdout and shown.stderr == ""


def test_the_version_is_shown() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"fluxd {__version__}\n")


def test_settings_prints_values_with_their_origin(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text("queue_limit = 5")
    result = run("settings", "--config", config, "--port", 9, "--set", "request-timeout-s=7.5")
    assert result.exit_code == 0
    printed = tomllib.loads(result.stdout)
    assert (printed["queue_limit"], printed["port"], printed["request_timeout_s"]) == (5, 9, 7.5)
    assert "port = 9  # flag" in result.stdout
    assert f"queue_limit = 5  # file {config}" in result.stdout
    assert 'device = "cpu"  # environment FLUXD_DEVICE' in result.stdout
    assert 'dtype = "auto"  # default' in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("settings", "--port", "99999"), "setting port (flag)"),
        (("settings", "--set", "prot=1"), "did you mean 'port'?"),
        (("settings", "--set", "port"), "--set takes NAME=VALUE"),
        (("settings", "--config", "absent.toml"), "settings file absent.toml"),
        (("generate", "x", "--model", "m", "--width", "500"), "multiple of 16"),
        (("generate", " ", "--model", "m"), "prompt must not be empty"),
        (("generate", "x", "--model", "m", "--seed", "-1"), "seed must be from 0"),
        (("generate", "x", "--model", "m", "--steps", "0"), "steps must be from 1"),
        (("generate", "x", "--model", "m", "--schedule", "fast"), "flux, linear, power"),
        (("generate", "x", "--model", "m", "--strength", "0.5"), "give a mask"),
        (("generate", "x", "--model", "m", "--strength", "nan"), "finite number"),
        (("generate", "x", "--model", "m", "-o", "x.gif"), ".png, .jpg, .jpeg, .webp"),
        (("generate", "x", "--model", "m", "-o", "absent/x.png"), "no directory absent"),
        (("generate", "x", "--model", "m", "-o", "-", "--n", "2"), "one picture"),
        (("generate", "x", "--model", "m", "--image", "absent.png"), "cannot read absent.png"),
        (("generate", "x", "--model", "m", "--device", "gpu"), "should be auto, cpu"),
        (("generate", "x", "--model", "m", "--show"), "no terminal to show pictures on"),
        (("generate", "x", "--model", "m", "--graphics", "png"), "auto, kitty, iterm2, sixel"),
        (("generate", "x", "-o", "-", "--graphics", "sixel"), "give -o a file name"),
        (("generate", "x", "--server", "ftp://x"), "--server takes an address"),
        (("generate", "x", "--server", "h", "--model", "m"), "--model is for drawing in this"),
        (("--model", "m", "serve"), "--model before 'serve' has no effect"),
    ],
)
def test_wrong_usage_is_one_plain_line_and_status_2(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("fluxd: ") and result.stderr.count("\n") == 1
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [(), ("generate",), ("draw",), ("serve", "--prot", "1")])
def test_usage_that_the_parser_refuses_has_status_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_a_reference_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"hello")
    result = run("generate", "x", "--model", "m", "--image", "broken.png")
    assert result.exit_code == 2
    assert result.stderr == "fluxd: broken.png is not a PNG, JPEG or WebP picture\n"


def test_a_model_that_is_not_there_has_status_1() -> None:
    result = run("generate", "x", "--model", "absent")
    assert result.exit_code == 1
    assert result.stderr.startswith("fluxd: ") and "absent" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "picture_format"),
    [("fox.png", "PNG"), ("fox.jpg", "JPEG"), ("FOX.JPEG", "JPEG"), ("fox.webp", "WEBP")],
)
def test_generate_writes_the_format_of_the_suffix(
    model: str, name: str, picture_format: str
) -> None:
    result = draw(model, "-o", name, "--seed", 7)
    assert result.exit_code == 0, result.stderr
    with Image.open(name) as picture:
        assert (picture.format, picture.size) == (picture_format, (64, 64))
    first, *_, timings = result.stderr.splitlines()
    assert first == f"{name}  64x64  seed 7"
    assert timings.startswith("load ") and " denoise " in timings and " pack " in timings
    assert result.stdout == ""


def test_generate_writes_the_metadata_and_the_same_file_again(model: str) -> None:
    for name in ("a.png", "b.png"):
        assert draw(model, "-o", name, "--seed", 7).exit_code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    with Image.open("a.png") as picture:
        assert "Seed: 7" in picture.text["parameters"]


def test_several_pictures_get_numbered_names(model: str) -> None:
    result = draw(model, "-o", "fox.png", "--seed", 7, "--n", 2)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in Path().glob("*.png")} == {"fox-1.png", "fox-2.png"}
    assert "fox-2.png  64x64  seed 8" in result.stderr
    alone = draw(model, "-o", "alone.png", "--seed", 8)
    assert alone.exit_code == 0
    assert Path("alone.png").read_bytes() == Path("fox-2.png").read_bytes()


def test_prompt_from_standard_input_and_picture_to_standard_output(model: str) -> None:
    result = draw(model, "-o", "-", prompt="-", stdin="ein Füchslein\n")
    assert result.exit_code == 0, result.stderr
    with Image.open(io.BytesIO(result.stdout_bytes)) as picture:
        assert picture.text["Description"] == "ein Füchslein"


def test_references_mask_and_the_other_parameters_are_used(model: str) -> None:
    PICTURE.save("one.png")
    PICTURE.save("two.jpg")
    mask = Image.new("L", PICTURE.size)
    mask.paste(255, (0, 0, 40, 64))
    mask.save("mask.png")
    common = ("--seed", 1, "--image", "one.png", "--image", "two.jpg")
    variants = {
        "plain": (),
        "masked": ("--mask", "mask.png"),
        "weak": ("--mask", "mask.png", "--strength", 0.5),
        "linear": ("--schedule", "linear"),
        "power": ("--schedule", "power", "--power-alpha", 3),
        "steps": ("--steps", 2),
    }
    pixels = {}
    for name, arguments in variants.items():
        result = draw(model, *common, *arguments, "-o", f"{name}.out.png")
        assert result.exit_code == 0, result.stderr
        with Image.open(f"{name}.out.png") as picture:
            assert picture.size == PICTURE.size
            pixels[name] = picture.tobytes()
    assert len(set(pixels.values())) == len(variants)


def test_what_has_no_effect_is_said(model: str) -> None:
    result = draw(model, "-o", "x.png", "--negative", "blurry", "--guidance", 3)
    assert "warning: guidance has no effect on a distilled model" in result.stderr
    assert "warning: negative_prompt has no effect on a distilled model" in result.stderr


def test_random_checkpoint_writes_a_model_that_draws(tmp_path: Path) -> None:
    result = run("random-checkpoint", "mine", "--preset", "tiny", "--seed", 3, "--base")
    assert (result.exit_code, result.stdout) == (0, "mine\n")
    drawn = draw("mine", "-o", "x.png", "--steps", 2, "--guidance", 3, "--negative", "dull")
    assert drawn.exit_code == 0, drawn.stderr
    with Image.open("x.png") as picture:
        assert "CFG scale: 3" in picture.text["parameters"]

    again = run("random-checkpoint", "mine")
    assert again.exit_code == 1 and "mine is not empty" in again.stderr
    unknown = run("random-checkpoint", "other", "--preset", "huge")
    assert unknown.exit_code == 1 and "tiny, 4b, 9b" in unknown.stderr


def test_bytes_that_are_no_text_are_refused() -> None:
    shown = subprocess.run(
        [*FLUXD, "generate", b"caf\xe9", "--model", "m"],
        env=environment(PYTHONUTF8="1"),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (shown.returncode, shown.stderr) == (2, b"fluxd: the prompt is not valid UTF-8\n")


def test_a_terminal_shows_progress_and_a_pipe_does_not(tiny_checkpoint: Path) -> None:
    pty = pytest.importorskip("pty")
    command = [*FLUXD, "generate", "x", "--model", str(tiny_checkpoint), "-o", "x.png"]
    command += ["--width", "64", "--height", "64"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, env=environment(TERM="xterm", COLUMNS="100"), stderr=theirs, stdout=subprocess.PIPE
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
        os.close(ours)
        assert process.wait(60) == 0, shown
    assert b"loading transformer" in shown and b"step 4 of 4" in shown and b"\x1b[" in shown
