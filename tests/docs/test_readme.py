"""README.md against the code: settings, file tree, the prompt and its options."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from app.cli import cli
from app.cli.commands import KEY_VARIABLE, SERVER_VARIABLE
from app.cli.prompt.commands import COMMANDS
from app.settings import CLIENT_VARIABLES, Settings, toml_value

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_THE_TERMINAL = README.partition("\n### In the terminal\n")[2].partition("\n## ")[0]


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


def test_the_commands_of_the_prompt_are_listed_and_no_other() -> None:
    assert set(re.findall(r"`!(\w+)[^`]*`", IN_THE_TERMINAL)) == set(COMMANDS)


def test_every_option_that_is_named_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z-]*", IN_THE_TERMINAL))
    shown = CliRunner().invoke(cli, ["generate", "--help"], terminal_width=200).stdout
    assert named and all(f"{option} " in shown for option in named)
    assert named >= {"--show", "--show-steps", "--server", "--key"}
    assert {SERVER_VARIABLE, KEY_VARIABLE} == set(CLIENT_VARIABLES)
    assert all(f"`{variable}`" in IN_THE_TERMINAL for variable in CLIENT_VARIABLES)
