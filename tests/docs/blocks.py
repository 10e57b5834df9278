"""The code blocks of the pages, and how each kind is made to run here.

A page is written for its reader: it names the default address, a model that lies somewhere
and a picture ``out.png``. Here they become a service that runs, a small model and a picture
that there is.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:7861"
MODEL = "path/to/FLUX.2-klein-4B"
PATIENCE_S = 240.0
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """One code block and where it stands."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Its place, as a test's name."""
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All of a page's blocks."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in _FENCED.finditer(text)
    ]


BLOCKS = [block for page in PAGES if page.is_file() for block in blocks_of(page)]


def in_language(*languages: str) -> list[Block]:
    """Blocks of all pages that are written in it."""
    return [block for block in BLOCKS if block.language in languages]


def make_picture(directory: Path) -> bytes:
    """Put an ``out.png`` there."""
    picture = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(picture, "PNG")
    (directory / "out.png").write_bytes(picture.getvalue())
    return picture.getvalue()


def run(
    command: list[str], directory: Path, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run it as its reader would, with this environment's programs; it must succeed."""
    programs = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLUXD_")}
    done = subprocess.run(
        command,
        cwd=directory,
        env={**kept, "PATH": f"{programs}{os.pathsep}{kept['PATH']}", "FLUXD_DEVICE": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def check_picture(path: Path) -> Image.Image:
    """A file that fluxd has drawn, by what stands in it."""
    with Image.open(path) as image:
        image.load()
    assert image.format == "PNG"
    made = image.text["parameters"]  # type: ignore[attr-defined]
    assert "Seed: " in made
    assert "Model: " in made
    return image
