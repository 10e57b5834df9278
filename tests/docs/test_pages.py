"""The pages in docs/: what is made from the code is up to date, and every link leads somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from starlette.testclient import TestClient

from app.api.reference import reference_page
from app.cli import cli
from app.main import create_app, create_engine, openapi_document
from app.settings import Settings
from tests.docs.blocks import PAGES, ROOT, blocks_of
from tests.docs.diagram import diagram

FLUXD = Path(sys.executable).parent / "fluxd"
# Their programs take hours or a GPU, so only what they name is checked.
READ = [*(page for page in PAGES if page.is_file()), *ROOT.glob("*/README.md")]


def headings(page: Path) -> set[str]:
    """Where links into a page may lead."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found)
    return {anchor.replace(" ", "-") for anchor in words}


def test_the_api_page_is_what_the_code_says() -> None:
    made = reference_page(openapi_document(Settings()))
    kept = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert made == kept, "write it anew: make docs"


def test_fluxd_openapi_prints_what_the_service_answers(tmp_path: Path) -> None:
    printed = subprocess.run(
        [FLUXD, "openapi"], cwd=tmp_path, capture_output=True, timeout=60, check=True
    ).stdout
    settings = Settings()
    engine = create_engine(settings, lambda progress: None)  # type: ignore[arg-type, return-value]
    client = TestClient(create_app(settings, engine), base_url="http://127.0.0.1")
    assert json.loads(printed) == client.get("/openapi.json").json()


def test_every_field_of_a_request_is_explained() -> None:
    for path, operations in openapi_document(Settings())["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            content = operation.get("requestBody", {}).get("content", {})
            for name, field in (
                content.get("application/json", {}).get("schema", {}).get("properties", {}).items()
            ):
                assert field.get("description"), (path, name)


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there), target


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_named_in_a_sentence_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    commands = typer.main.get_command(cli).commands  # type: ignore[attr-defined]
    for program, words in re.findall(r"`(fluxd|make) ([^`]+)`", text):
        first = words.split()[0]
        if program == "make":
            assert first in targets, f"make {words}"
        elif not first.startswith("-"):
            assert first in commands, f"fluxd {words}"
            known = {option for given in commands[first].params for option in given.opts}
            assert set(re.findall(r"(?<= )--[a-z-]+", f" {words}")) <= known, f"fluxd {words}"


def test_the_diagram_is_what_import_linter_checks() -> None:
    (block,) = [
        block for block in blocks_of(ROOT / "docs/architecture.md") if block.language == "mermaid"
    ]
    assert block.text == diagram(), "write it anew: make docs"
