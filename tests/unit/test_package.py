"""What importing fluxcore costs, and what its names lead to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fluxcore

# Run in a process of its own: here, torch is loaded long before.
IMPORTS = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
    heavy = {"torch", "numpy", "safetensors", "diffusers", "transformers"} & sys.modules.keys()
    assert not heavy, f"{name} loads {heavy}"
import fluxcore
assert fluxcore.GenerationParams(prompt="a fox").n == 1
assert "torch" not in sys.modules, "GenerationParams loads torch"
assert fluxcore.FluxPipeline.__name__ == "FluxPipeline"
assert "torch" in sys.modules, "the check sees no import at all"
assert "diffusers" not in sys.modules
assert "transformers" not in sys.modules
"""

DRAWING = """
import sys
from fluxcore import FluxPipeline, GenerationParams
pipe = FluxPipeline.load(sys.argv[1], device="cpu", dtype="float32")
pipe.generate(GenerationParams(prompt="a fox", width=64, height=64, steps=1))
sys.exit("torch._dynamo" in sys.modules)
"""


def test_requests_can_be_checked_without_loading_torch() -> None:
    light = "fluxcore fluxcore.version fluxcore.errors fluxcore.params fluxcore.config"
    subprocess.run([sys.executable, "-c", IMPORTS, light], check=True, capture_output=True)


def test_the_tokenizer_needs_no_torch() -> None:
    check = "import sys, fluxcore.text; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_start_does_not_pay_for_the_compiler(tiny_checkpoint: Path) -> None:
    """Three seconds of imports that a single call on the meta device can bring."""
    subprocess.run([sys.executable, "-c", DRAWING, str(tiny_checkpoint)], check=True)


def test_every_public_name_is_there() -> None:
    for name in fluxcore.__all__:
        assert getattr(fluxcore, name) is not None
    from fluxcore.params import GenerationParams
    from fluxcore.pipeline import FluxPipeline, GenerationResult

    assert fluxcore.FluxPipeline is FluxPipeline
    assert fluxcore.GenerationParams is GenerationParams
    assert fluxcore.GenerationResult is GenerationResult


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fluxcore' has no attribute 'FluxPipelin'"):
        fluxcore.FluxPipelin  # noqa: B018


def test_the_version_has_three_numbers() -> None:
    assert [part.isdecimal() for part in fluxcore.__version__.split(".")] == [True] * 3
