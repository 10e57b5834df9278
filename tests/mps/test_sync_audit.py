"""Inside a denoising step the host never waits for the device, and starts few kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxcore import GenerationParams
from fluxcore.models import flux2
from fluxcore.pipeline import denoise
from fluxcore.weights.random_architecture import PRESETS
from tests.mps.audit import Audit, Ran
from tests.mps.conftest import AuditedRun
from tests.mps.pipelines import denoise_audited, weightless_pipeline

WAITING = {"upload", "download", "wait"}

KERNELS = {
    # dtype: of a double block, of a single block, and of the rest of a step
    "float16": (0, 0, 0),
    "bfloat16": (0, 0, 0),
}
"""Most kernels that a step may start: no more were needed when this was written."""


def kernels_per_step(directory: Path, dtype: str, doubles: int, singles: int) -> int:
    """Kernels of one step of a transformer with so many blocks, the later ones being alike."""
    shape = replace(
        PRESETS["tiny"].transformer, num_layers=doubles, num_single_layers=singles
    )
    architecture = replace(PRESETS["tiny"], transformer=shape)
    params = GenerationParams(prompt="a", width=64, height=64, steps=3, guidance=1.0)
    with Audit(storage="meta") as audit, pytest.MonkeyPatch.context() as patch:
        pipe = weightless_pipeline(directory, architecture, dtype, patch)
        steps = [step.ran for step in denoise_audited(pipe, params, audit)]
    counts = [sum(ran.kind == "kernel" for ran in step) for step in steps[1:]]
    assert len(set(counts)) == 1
    return counts[0]
