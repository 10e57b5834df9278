"""The published architectures on tensors without memory: none is too large for MPS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcore import GenerationParams
from fluxcore.kernels import plain_attention
from fluxcore.pipeline.latents import unpack
from fluxcore.runtime import device
from fluxcore.weights.random_architecture import PRESETS, Architecture
from tests.mps.audit import ATTENTION, BECOMES, Audit
from tests.mps.pipelines import denoise_audited, noisy_picture, weightless_pipeline
from tests.mps.pretend import DEVICE


@pytest.mark.parametrize(
    ("preset", "dtype", "side", "references", "guidance"),
    [
        ("4b", "bfloat16", 1024, 1, 4.0),
        ("4b", "float16", 2048, 10, 1.0),
        ("9b", "float16", 2048, 10, 1.0),
    ],
)
def test_no_tensor_and_no_score_matrix_is_too_large(
    tmp_path: Path, preset: str, dtype: str, side: int, references: int, guidance: float
) -> None:
    params = GenerationParams(
        prompt="a red fox",
        width=side,
        height=side,
        steps=1,
        guidance=guidance,
        references=(noisy_picture(1024, 1024, 0),) * references,
    )
    rows = side // 16
    with Audit(storage="meta") as audit, pytest.MonkeyPatch.context() as patch:
        pipe = weightless_pipeline(tmp_path, one_block_each(preset), dtype, patch)
        audit.finish("load")
        (step,) = denoise_audited(pipe, params, audit)
        pipe.vae.decode(pipe._to_vae(unpack(step.latents, (rows, rows))))
        audit.finish("decode")
    audit.check()
    heads = PRESETS[preset].transformer.num_attention_heads
    tokens = 512 + rows**2 + references * 64**2
    passes = 2 if guidance > 1 else 1
    # The last block is asked for the picture's rows alone.
    of_blocks = [(1, heads, tokens, 128), (1, heads, rows**2, 128)]
    assert queries(audit, "denoise") == of_blocks * passes
    assert queries(audit, "decode") == [(1, 1, 2048, 512)] * ((2 * rows) ** 2 // 2048)


def one_block_each(preset: str) -> Architecture:
    """A published architecture with one double and one single block, all blocks being alike."""
    whole = PRESETS[preset]
    return replace(whole, transformer=replace(whole.transformer, num_layers=1, num_single_layers=1))


def test_the_text_encoder_is_fit_for_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Audit(storage="meta") as audit:
        pipe = weightless_pipeline(tmp_path, one_block_each("4b"), "float16", monkeypatch)
        audit.finish("load")
        pipe.encode_prompt("a red fox")
        audit.finish("text")
    audit.check()
    assert queries(audit, "text") == [(1, 32, 512, 128)] * 27


def test_attention_of_the_vae_in_one_piece_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "chunked_attention", plain_attention)
    small = replace(PRESETS["tiny"], vae=PRESETS["4b"].vae)
    with Audit(storage="meta") as audit:
        pipe = weightless_pipeline(tmp_path, small, "bfloat16", monkeypatch)
        pipe.vae.decode(torch.empty(1, 128, 128, 128, dtype=torch.bfloat16, device=DEVICE))
    details = [violation.detail for violation in audit.violations]
    assert {violation.rule for violation in audit.violations} == {"attention"}
    assert any("more than 2^30 scores" in detail for detail in details)
    assert any("more than 2048 rows" in detail for detail in details)


def queries(audit: Audit, stage: str) -> list[tuple[int, ...]]:
    """Shapes of the queries of every attention in a stage."""
    ran = [each for each in audit.named(stage) if each.operator == BECOMES[ATTENTION]]
    return [tuple(each.operands[0][0]) for each in ran]
