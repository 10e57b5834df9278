"""How a checkpoint lies on disk: file names, shards, indexes, and how a directory appears.

Owns what every writer of checkpoints shares: random ones and trained ones. What
is left behind is either a whole checkpoint or nothing that passes for one. Knows
nothing of tensors; a writer says how large each one is.

Source: the directory layout of black-forest-labs/FLUX.2-klein-4B on Hugging Face.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fluxcore.errors import CheckpointError

Item = TypeVar("Item")

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
"""How a component's weight files begin."""


def split_by_size(
    items: Iterable[Item], size_of: Callable[[Item], int], max_bytes: int
) -> list[list[Item]]:
    """Consecutive items in groups of at most ``max_bytes``; a larger item has its own."""
    groups: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        size = size_of(item)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def shard_names(stem: str, count: int) -> list[str]:
    """The names of a component's weight files."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(directory: Path, stem: str, file_of: Mapping[str, str], total_bytes: int) -> None:
    """Write which tensor lies in which shard; a component of one file needs no index."""
    write_json(
        directory / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(file_of)},
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, one field a line."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_free(target: Path) -> None:
    """Check that a checkpoint may be written to ``target``.

    Raises:
        CheckpointError: it holds something already.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(
                f"{target} is not empty and is never overwritten; remove it or name another"
            )
    elif os.path.lexists(target):
        raise CheckpointError(f"{target} is not a directory; remove it or name another")


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A sibling directory that becomes ``target`` if all goes well, and vanishes if not.

    Raises:
        CheckpointError: ``target`` holds something, at the start or at the end.
    """
    check_free(target)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    build = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    build.mkdir()
    try:
        yield build
        check_free(target)
        if target.is_dir():
            target.rmdir()
        build.rename(target)
    finally:
        shutil.rmtree(build, ignore_errors=True)  # gone already, if all went well
