"""Weights that come and go keep the rules of MPS, and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxcore import GenerationParams
from tests.mps.audit import Audit
from tests.mps.pipelines import pipeline_on, run_audited


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_low_residency_is_fit_for_mps_and_draws_the_same(
    tiny_base_checkpoint: Path, dtype: str
) -> None:
    params = GenerationParams(
        prompt="a fox", negative_prompt="fog", width=64, height=64, steps=2, guidance=3.0, seed=1
    )
    drawn = {}
    for way in ("resident", "low"):
        with Audit() as audit:
            pipe = pipeline_on(tiny_base_checkpoint, dtype, residency=way)
            audit.finish("load")
            drawn[way] = run_audited(pipe, params, audit)
        audit.check()
    assert drawn["resident"].picture.tobytes() == drawn["low"].picture.tobytes()
    layers = {"text": 2 * 27, "denoise": 2 * 4}
    for stage, expected in layers.items():
        last = [each for each in drawn["low"].slices if each.stage == stage][-1]
        uploads = sum(ran.kind == "upload" and ran.operator == "copy_" for ran in last.ran)
        plain = [each for each in drawn["resident"].slices if each.stage == stage][-1]
        others = sum(ran.kind == "upload" and ran.operator == "copy_" for ran in plain.ran)
        # one for each layer and pass, and the encoder's rows of its embedding
        assert uploads - others == expected + (2 if stage == "text" else 0)
