"""README.md against the code: settings, file tree, parameters, and every curl line for real."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.api.schemas import GenerateRequest
from app.settings import Settings, toml_value
from tests.docs.served import Served, serve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CURLS = [block for block in re.findall(r"```sh\n(.*?)```", README, re.S) if "curl" in block]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(data_dir=str(tmp_path_factory.mktemp("data"))) as running:
        yield running


def _rows(after: str) -> list[list[str]]:
    """Cells of the first table that follows a line."""
    _, _, rest = README.partition(after)
    table = re.search(r"\n\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", rest)
    assert table is not None
    return [[c.strip() for c in row.strip("|").split(" | ")] for row in table[1].splitlines()]


def test_the_settings_table_is_the_settings() -> None:
    rows = {row[0].strip("` "): row[1:] for row in _rows("## Settings")}
    assert list(rows) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        default = "none" if field.default is None else f"`{toml_value(field.default)}`"
        assert rows[name] == [default, field.description]


def test_the_table_of_fields_is_the_request() -> None:
    names = [
        name for row in _rows("### `POST /v1/generate`") for name in re.findall(r"`(\w+)`", row[0])
    ]
    assert sorted(names) == sorted(GenerateRequest.model_fields)


def test_every_entry_of_the_tree_exists_and_no_module_is_left_out() -> None:
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.S)
    assert tree is not None
    listed, parents = set(), [""]
    for line in tree[1].splitlines():
        indent, name = re.match(r"( *)(\S+)  +\S", line).groups()  # type: ignore[union-attr]
        path = "/".join([*parents[1 : len(indent) // 2 + 1], name.rstrip("/")])
        parents = [*parents[: len(indent) // 2 + 1], name.rstrip("/")]
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == name.endswith("/"), path
        listed.add(path)
    for package in ("app", "fluxcore", "tests"):
        for entry in (ROOT / package).iterdir():
            kept = entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py")))
            if kept and entry.name not in ("__init__.py", "conftest.py", "__pycache__"):
                assert f"{package}/{entry.name}" in listed, f"{entry} is missing in README's tree"


@pytest.mark.parametrize("block", CURLS, ids=[f"block {i}" for i in range(len(CURLS))])
def test_every_curl_line_works(block: str, served: Served, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    picture = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(picture, "PNG")
    (tmp_path / "out.png").write_bytes(picture.getvalue())
    block = block.replace("http://127.0.0.1:7861", served.url).replace("curl -s", "curl -fs")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[:500]}\n{done.stderr}"
    written = re.search(r"-o (\S+\.png)", block)
    if written:
        assert (tmp_path / written[1]).read_bytes() != picture.getvalue()
        with Image.open(tmp_path / written[1]) as image:
            assert image.format == "PNG"
            made = image.text["parameters"]  # type: ignore[attr-defined]
            assert "Seed: " in made and "Model: fluxd-demo" in made
    elif "stream" in block:
        assert done.stdout.startswith("event: ")
        assert "completed\ndata: {" in done.stdout
    elif block.rstrip().endswith("/metrics"):
        assert "\nfluxd_queue_depth 0.0\n" in done.stdout
    else:
        assert json.JSONDecoder().raw_decode(done.stdout)[0]
