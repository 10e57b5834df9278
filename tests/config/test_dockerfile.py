"""Dockerfile.dev as far as it can be told without building it."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from app.settings import ENV_PREFIX, load_settings
from tests.config.conftest import ROOT
from tests.docs.served import Served

TEXT = (ROOT / "Dockerfile.dev").read_text(encoding="utf-8")
# One instruction a line, its continuations joined and comments left out.
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"^#.*\n", "", TEXT, flags=re.M).replace("\\\n", " ").splitlines()
    if line.strip()
]


def given(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def copied() -> list[tuple[str, str]]:
    """Every file that the image copies, and where to."""
    found = []
    for line in given("COPY"):
        *sources, target = [word for word in line.split() if not word.startswith("--")]
        found += [
            (source, f"{target}{source}" if target.endswith("/") else target) for source in sources
        ]
    return found


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    for source, _ in copied():
        assert (ROOT / source).is_file(), source
        assert any(fnmatch.fnmatch(source, rule) for rule in kept), source
    assert set(kept) == {source for source, _ in copied()}


def test_what_is_copied_suffices_for_an_editable_install(tmp_path: Path) -> None:
    source, made = tmp_path / "src", tmp_path / "made"
    made.mkdir()
    for name, target in copied():
        (source / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / target)
    prepare = "prepare_metadata_for_build_editable"
    build = f"from hatchling import build; build.{prepare}({str(made)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, timeout=60)
    assert len(list(made.glob("fluxd-*.dist-info/METADATA"))) == 1


def test_the_image_runs_targets_of_the_makefile_on_a_python_that_fits() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    (command,) = given("CMD")[-1:]
    words = [" ".join(json.loads(command)), *given("RUN"), *re.findall(r"^# +(docker .*)", TEXT)]
    asked = {name for line in words for name in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {"install", "serve"} <= asked <= targets
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (base,) = given("FROM")
    version = re.fullmatch(r"python:3\.(\d+)-slim", base)
    assert version is not None
    assert int(version[1]) >= int(project["requires-python"].removeprefix(">=3."))


def test_its_environment_is_settings_and_its_port_is_published() -> None:
    pairs = dict(pair.split("=", 1) for line in given("ENV") for pair in line.split())
    variables = {name: value for name, value in pairs.items() if name.startswith(ENV_PREFIX)}
    settings = load_settings({}, variables, ROOT / "config/fluxd.toml").values
    assert settings.host == "0.0.0.0"
    assert given("EXPOSE") == [str(settings.port)]
    assert f"-p 127.0.0.1:{settings.port}:{settings.port} " in TEXT
    (check,) = given("HEALTHCHECK")
    assert f"http://127.0.0.1:{settings.port}/health" in check


def test_its_health_check_tells_a_service_from_none(running: Served) -> None:
    (check,) = given("HEALTHCHECK")
    _, _, code = json.loads(check.partition("CMD")[2])

    def is_healthy(url: str) -> bool:
        there = code.replace("http://127.0.0.1:7861", url)
        done = subprocess.run(
            [sys.executable, "-c", there], capture_output=True, timeout=60, check=False
        )
        return done.returncode == 0

    assert is_healthy(running.url)
    # Nothing can listen there.
    assert not is_healthy("http://127.0.0.1:0")
