"""Copies of a checkpoint that a test may break, and the bytes of safetensors files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPONENTS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}


def copy_checkpoint(source: Path, target: Path, *components: str) -> Path:
    """A checkpoint of which only ``components`` are copied; the others are linked."""
    target.mkdir()
    shutil.copy(source / "model_index.json", target)
    for name in COMPONENTS:
        if name in components:
            shutil.copytree(source / name, target / name)
        else:
            (target / name).symlink_to(source / name)
    return target


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change fields of a JSON object; the value ``...`` removes a field."""
    values = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept))


def weight_file(checkpoint: Path, component: str) -> Path:
    """The component's single safetensors file."""
    return checkpoint / component / f"{STEMS[component]}.safetensors"


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Mapping[str, Any], data: bytes) -> bytes:
    """Undo ``split_safetensors``, whatever the header says."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
