"""The comparison with diffusers: both draw the same, and a wrong answer would show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import compare_diffusers
from loadtest.compare_diffusers import EAGER, FLUXD, Drawn, compare

STAGES = {"text", "denoise", "decode", "total"}


def asked(checkpoint: Path) -> argparse.Namespace:
    return argparse.Namespace(
        checkpoint=checkpoint,
        sizes=[64],
        steps=2,
        runs=2,
        device="cpu",
        dtype="float32",
        settings=[],
        keep=None,
    )


@pytest.fixture(scope="module")
def report(tiny_checkpoint: Path) -> dict[str, Any]:
    return compare(asked(tiny_checkpoint), [FLUXD, EAGER])


def test_both_are_timed_by_stage(report: dict[str, Any]) -> None:
    engines = report["sizes"]["64"]["engines"]
    assert list(engines) == [FLUXD, EAGER]
    for found in engines.values():
        assert set(found["median_ms"]) == STAGES and found["runs"] == 2
        assert found["first_ms"] > 0 and min(found["median_ms"].values()) > 0


def test_they_draw_the_same_picture(report: dict[str, Any]) -> None:
    found = report["sizes"]["64"]["distances"][FLUXD]
    assert found["embeddings_relative_rms"] < 1e-5
    assert found["latents_relative_rms"] < 1e-5
    assert found["picture_max_abs"] <= 1


def test_a_wrong_answer_shows() -> None:
    right = Drawn({}, np.ones((1, 4, 4)), np.ones((1, 4, 4)), np.full((8, 8, 3), 9, np.uint8))
    wrong = Drawn({}, 2 * right.embeddings, 1.5 * right.latents, right.picture + np.uint8(3))
    found = compare_diffusers.distance(wrong, right)
    assert found["embeddings_relative_rms"] == pytest.approx(1.0)
    assert found["latents_relative_rms"] == pytest.approx(0.5)
    assert found["picture_mean_abs"] == found["picture_max_abs"] == 3
    assert found["picture_psnr_db"] == pytest.approx(38.59, abs=0.01)
