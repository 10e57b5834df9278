"""Every code block of README and docs, run as its reader would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.settings import load_settings
from tests.docs.blocks import (
    ADDRESS,
    BLOCKS,
    MODEL,
    PATIENCE_S,
    ROOT,
    Block,
    check_picture,
    in_language,
    make_picture,
    run,
)
from tests.docs.served import Served, serve
from tests.service.openai.test_node_sdk import CLIENT, node

# Programs that draw, on a machine that may be busy.
pytestmark = pytest.mark.timeout(PATIENCE_S + 30)

SHELL = in_language("sh")
MAKE = [block for block in SHELL if re.match(r"make ", block.text)]
CURL = [block for block in SHELL if "curl " in block.text]
COMMANDS = [block for block in SHELL if block not in MAKE and block not in CURL]
# Drawings and trees, which other tests read; and bodies of requests and files.
READ_ELSEWHERE = {"", "mermaid"}


def name_of(block: Block) -> str:
    return block.name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The bundled model, which a newcomer meets."""
    with serve(data_dir=str(tmp_path_factory.mktemp("data"))) as running:
        yield running


def test_there_is_a_test_for_every_language() -> None:
    tested = {"sh", "python", "js", "toml", "dotenv", *READ_ELSEWHERE}
    assert {block.language for block in BLOCKS} <= tested


@pytest.mark.parametrize("block", CURL, ids=name_of)
def test_a_curl_line_works(block: Block, served: Served, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    picture = make_picture(tmp_path)
    text = block.text.replace(ADDRESS, served.url).replace("curl -s", "curl -fs")
    answer = run(["bash", "-euo", "pipefail", "-c", text], tmp_path).stdout
    written = re.search(r"-o (\S+\.png)", block.text)
    if written:
        assert (tmp_path / written[1]).read_bytes() != picture
        check_picture(tmp_path / written[1])
    elif "stream" in block.text:
        assert answer.startswith("event: ")
        assert "completed\ndata: {" in answer
    else:
        assert json.JSONDecoder().raw_decode(answer)[0]
    if block.text.rstrip().endswith("/metrics"):
        assert "\nfluxd_queue_depth 0.0\n" in answer


@pytest.mark.parametrize(
    "block",
    [
        # It looks at the whole machine, and has tests of its own.
        pytest.param(block, marks=pytest.mark.slow) if "fluxd doctor" in block.text else block
        for block in COMMANDS
    ],
    ids=name_of,
)
def test_a_command_works(block: Block, tiny_checkpoint: Path, tmp_path: Path) -> None:
    make_picture(tmp_path)
    text = block.text.replace(MODEL, str(tiny_checkpoint))
    run(["bash", "-euo", "pipefail", "-c", text], tmp_path)
    for written in re.findall(r"(?:-o|>) (\S+\.png)", block.text):
        check_picture(tmp_path / written)


@pytest.mark.parametrize("block", MAKE, ids=name_of)
def test_a_target_of_make_runs_what_there_is(block: Block) -> None:
    """Shown, not run: it would install, or run these tests again."""
    # Without what the make that runs these tests was given: its ARGS would be taken for theirs.
    reader_s = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    for line in block.text.splitlines():
        words = line.partition("#")[0].split()
        shown = subprocess.run(
            [*words[:1], "--dry-run", *words[1:]],
            cwd=ROOT,
            env=reader_s,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert shown.returncode == 0, f"{line}\n{shown.stderr}"
        served = re.search(r"^exec \S+/fluxd (serve.*)$", shown.stdout, re.M)
        assert served or "serve" not in words
        if served:
            fluxd = Path(sys.executable).parent / "fluxd"
            run(["bash", "-c", f"{fluxd} {served[1]} --help"], ROOT)


@pytest.mark.parametrize("block", in_language("python"), ids=name_of)
def test_a_python_program_works(block: Block, served: Served, tmp_path: Path) -> None:
    picture = make_picture(tmp_path)
    run([sys.executable, "-c", block.text.replace(ADDRESS, served.url)], tmp_path)
    written = re.findall(r'"(\w+\.png)"', block.text)
    assert written
    for name in written:
        assert (tmp_path / name).read_bytes() != picture
        with Image.open(tmp_path / name) as drawn:
            drawn.load()


@pytest.mark.parametrize("block", in_language("js"), ids=name_of)
def test_a_node_program_works(block: Block, served: Served, tmp_path: Path) -> None:
    interpreter = node()
    (tmp_path / "node_modules").symlink_to(CLIENT / "node_modules")
    program = tmp_path / "program.mjs"
    program.write_text(block.text.replace(ADDRESS, served.url), encoding="utf-8")
    run([interpreter, str(program)], tmp_path)
    for name in set(re.findall(r'"(\w+\.png)"', block.text)):
        check_picture(tmp_path / name)


@pytest.mark.parametrize("block", in_language("toml"), ids=name_of)
def test_settings_are_taken(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "fluxd.toml"
    path.write_text(block.text, encoding="utf-8")
    origins = load_settings({}, {}, path).origins
    for name in tomllib.loads(block.text):
        assert origins[name] == f"file {path}"


@pytest.mark.parametrize("block", in_language("dotenv"), ids=name_of)
def test_an_app_s_settings_lead_to_the_service(block: Block, served: Served) -> None:
    given = dict(line.split("=", 1) for line in block.text.splitlines())
    addresses = {value for value in given.values() if value.startswith("http")}
    assert addresses == {f"{ADDRESS}/v1"}
    with urllib.request.urlopen(f"{served.url}/v1/models", timeout=60) as answer:
        listed = {model["id"] for model in json.load(answer)["data"]}
    assert {value for name, value in given.items() if name.endswith("_MODEL")} <= listed
