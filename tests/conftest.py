"""What all kinds of tests share: two tiny checkpoints and one loaded pipeline.

The checkpoints are real ones in the published layout with random weights. Tests
must not change them: whoever breaks a file does so in a copy of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from fluxcore import FluxPipeline

# The same examples in every run, and no deadline: a busy machine is no failure.
settings.register_profile("fluxd", deadline=None, derandomize=True)
settings.load_profile("fluxd")

# Read when torch is loaded, which is why it is imported below and not above. Threads that
# wait spin by default, which beside other work made these tests four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Workers side by side, and what they start, take one core each: two threads that share a core
# with another worker's two wait for one another at every operation.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when Triton is loaded: without a GPU its kernels are interpreted.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled model: 4 steps, no guidance."""
    from fluxcore.weights.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_base_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: guidance and negative prompts have an effect."""
    from fluxcore.weights.random_checkpoint import write_random_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-base"
    return write_random_checkpoint(directory, is_distilled=False)


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint: Path) -> FluxPipeline:
    """The distilled model on the CPU in float32."""
    from fluxcore import FluxPipeline

    return FluxPipeline.load(tiny_checkpoint, device="cpu", dtype="float32")
