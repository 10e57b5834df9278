"""The model that ships with the package, for when none is named.

Owns where it lies. It is a checkpoint directory like any other, and is loaded like
any other; it draws coloured shapes, and ``demo/`` of the repository is how it was made.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

BUNDLED_NAME = "fluxd-demo"

KNOWN_PROMPT = "a large yellow star on a gradient from purple to orange"
KNOWN_SEED = 42
KNOWN_PICTURE = Path(str(files(__name__) / "known-picture.png"))
"""What the bundled model draws from these, in float32 on a CPU and its default size."""


def bundled_model() -> Path:
    """The checkpoint directory of the bundled model."""
    return Path(str(files(__name__) / BUNDLED_NAME)).resolve()


def is_bundled(directory: Path) -> bool:
    """Whether a checkpoint directory is the bundled one, however it was named."""
    return directory.resolve() == bundled_model()
