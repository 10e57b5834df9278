"""Fixtures of the unit tests alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxcore import FluxPipeline


@pytest.fixture(scope="session")
def tiny_narrow(tiny_checkpoint: Path) -> dict[str, FluxPipeline]:
    """The distilled model on the CPU in bfloat16 and in float16, by dtype."""
    return {
        dtype: FluxPipeline.load(tiny_checkpoint, device="cpu", dtype=dtype)
        for dtype in ("bfloat16", "float16")
    }
