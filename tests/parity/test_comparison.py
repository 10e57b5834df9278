"""The comparison with diffusers: both draw the same, and a wrong answer would show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import compare_diffusers
from loadtest.compare_diffusers import EAGER, FLUXD, HTTP, Drawn, compare

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
    with pytest.MonkeyPatch.context() as patched:
        # As it stands beside the program when that is run.
        patched.syspath_prepend(Path(compare_diffusers.__file__).parent)
        return compare(asked(tiny_checkpoint), [FLUXD, HTTP, EAGER])


def test_both_are_timed_by_stage(report: dict[str, Any]) -> None:
    engines = report["sizes"]["64"]["engines"]
    assert list(engines) == [FLUXD, HTTP, EAGER]
    for name, found in engines.items():
        told = STAGES | {"queue", "paused", "pack"} if name == HTTP else STAGES
        assert set(found["median_ms"]) == told
        assert found["runs"] == 2
        assert found["first_ms"] > 0 and all(found["median_ms"][stage] > 0 for stage in STAGES)


def test_they_draw_the_same_picture(report: dict[str, Any]) -> None:
    found = report["sizes"]["64"]["distances"][FLUXD]
    assert found["embeddings_relative_rms"] < 1e-5
    assert found["latents_relative_rms"] < 1e-5
    assert found["picture_max_abs"] <= 1


def test_what_comes_over_http_is_that_picture(report: dict[str, Any]) -> None:
    found = report["sizes"]["64"]["distances"][HTTP]
    assert set(found) == {"picture_mean_abs", "picture_max_abs", "picture_psnr_db"}
    assert found["picture_max_abs"] <= 1


def test_a_service_takes_longer_than_its_stages(report: dict[str, Any]) -> None:
    told = report["sizes"]["64"]["engines"][HTTP]["median_ms"]
    assert told["total"] > told["text"] + told["denoise"] + told["decode"]


def test_a_wrong_answer_shows() -> None:
    right = Drawn({}, np.ones((1, 4, 4)), np.ones((1, 4, 4)), np.full((8, 8, 3), 9, np.uint8))
    wrong = Drawn({}, 2 * right.embeddings, 1.5 * right.latents, right.picture + np.uint8(3))
    found = compare_diffusers.distance(wrong, right)
    assert found["embeddings_relative_rms"] == pytest.approx(1.0)
    assert found["latents_relative_rms"] == pytest.approx(0.5)
    assert found["picture_mean_abs"] == found["picture_max_abs"] == 3
    assert found["picture_psnr_db"] == pytest.approx(38.59, abs=0.01)
