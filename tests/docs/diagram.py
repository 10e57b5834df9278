"""The diagram of the layers, drawn from the contracts that import-linter checks.

    python -m tests.docs.diagram

puts it into docs/architecture.md; ``make docs`` does so, too.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/architecture.md"
_BLOCK = re.compile(r"(?<=^```mermaid\n).*?(?=^```$)", re.S | re.M)


def diagram() -> str:
    """The Mermaid block's text."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    layered = [contract for contract in contracts if contract["type"] == "layers"]
    lines = ["flowchart TD"]
    for contract in layered:
        for container in contract.get("containers", ()):
            lines.append(f'    subgraph {container}["{container}"]')
            lines += [f"        {line}" for line in _chain(container, contract["layers"])]
            lines.append("    end")
    for contract in layered:
        if "containers" not in contract:
            upper, lower = contract["layers"]
            lines.append(f"    {upper} --> {lower}")
    return "\n".join(lines) + "\n"


def _chain(container: str, layers: list[str]) -> list[str]:
    names = [f"{container}_{index}" for index in range(len(layers))]
    boxes = [f'{name}["{layer}"]' for name, layer in zip(names, layers, strict=True)]
    arrows = [f"{upper} --> {lower}" for upper, lower in itertools.pairwise(names)]
    return boxes + arrows


if __name__ == "__main__":
    PAGE.write_text(_BLOCK.sub(diagram(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
