"""Rules of MPS that lie outside of its operators: noise, chips, memory, the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import OutOfMemoryError
from fluxcore.runtime import Runtime, translated_errors
from fluxcore.runtime.dtypes import choose_dtypes
from tests.mps.audit import Audit
from tests.mps.pipelines import denoise_audited
from tests.mps.pretend import DEVICE

OUT_OF_MEMORY = {
    "watermark": "MPS backend out of memory (MPS allocated: 17.36 GB, other allocations: "
    "613.56 MB, max allowed: 18.13 GB). Tried to allocate 192.00 MB on private pool. Use "
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations "
    "(may cause system failure).",
    "buffer": "Invalid buffer size: 40.00 GiB",
    "graph": "MPSGraph does not support tensor dims larger than INT_MAX",
    "command": "MPS: command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
}

OTHER = {
    "kernel": "Could not run 'aten::mode' with arguments from the 'MPS' backend.",
    "shape": "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
    "dtype": "Cannot convert a MPS Tensor to float64 dtype",
}

WATCH_ENVIRONMENT = """
import importlib, os, pkgutil, sys
written = set()
sys.addaudithook(lambda event, args: written.add(args[0]) if event == "os.putenv" else None)
for package in sys.argv[1:]:
    for module in pkgutil.walk_packages([package], package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    print(package, len([name for name in sys.modules if name.startswith(package + ".")]))
print("written", *sorted(os.fsdecode(name) for name in written))
"""

NEVER_SET = {"PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_PREFER_METAL"}


def small(seed: int) -> GenerationParams:
    return GenerationParams(prompt="a fox", width=64, height=64, steps=1, guidance=1.0, seed=seed)


def test_noise_is_drawn_on_the_host(small_pipeline: FluxPipeline) -> None:
    state = torch.get_rng_state()
    with Audit() as audit:
        job = small_pipeline.prepare(small(seed=11))
        step = next(small_pipeline.denoise(job))
        begun = step.latents_before.cpu()
    audit.check()
    host = torch.Generator("cpu").manual_seed(11)
    drawn = torch.randn((1, 128, 4, 4), generator=host).flatten(2).transpose(1, 2)
    assert torch.equal(begun, drawn.to(torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


@pytest.mark.parametrize(
    ("chip", "weights", "residual"),
    [
        ("Apple M1", torch.float16, torch.float32),
        ("Apple M2 Ultra", torch.float16, torch.float32),
        ("Apple M3 Max", torch.bfloat16, None),
        ("Apple M12", torch.bfloat16, None),
    ],
)
def test_dtypes_follow_the_chip(
    chip: str, weights: torch.dtype, residual: torch.dtype | None
) -> None:
    chosen = choose_dtypes("mps", "auto", chip)
    assert (chosen.weights, chosen.residual, chosen.angles) == (weights, residual, torch.float32)


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_out_of_memory_is_recognised(name: str) -> None:
    with pytest.raises(OutOfMemoryError, match="smaller size"), translated_errors():
        raise RuntimeError(OUT_OF_MEMORY[name])


@pytest.mark.parametrize("name", OTHER)
def test_other_failures_are_not_taken_for_it(name: str) -> None:
    with pytest.raises(RuntimeError, match=OTHER[name][:9]), translated_errors():
        raise RuntimeError(OTHER[name])


@pytest.mark.parametrize("stage", ["text_encoder", "transformer", "vae"])
def test_it_lets_go_of_its_tensors_and_the_next_job_is_served(
    small_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def full(*_: object) -> None:
        filling = torch.ones(3)
        held.append(weakref.ref(filling))
        raise RuntimeError(OUT_OF_MEMORY["watermark"])

    network = getattr(small_pipeline, stage)
    small_pipeline.conditioning_cache.clear()
    with Audit(), monkeypatch.context() as patch:
        patch.setattr(network, "decode" if stage == "vae" else "forward", full)
        with pytest.raises(OutOfMemoryError) as caught:
            small_pipeline.generate(small(seed=1))
    # the error is still at hand, to be answered and logged
    assert [reference() for reference in held] == [None], f"held by {caught.value!r}"
    with Audit():
        assert small_pipeline.generate(small(seed=2)).images


def test_memory_is_given_back_once_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.mps, name, lambda name=name: called.append(name))
    dtypes = choose_dtypes("mps", "auto", "Apple M4")
    Runtime(device=DEVICE, kind="mps", dtypes=dtypes, chip="Apple M4").release_memory()
    assert called == ["synchronize", "empty_cache"]


def test_no_module_turns_the_fallback_to_the_host_on() -> None:
    """Gaps must fail loudly. PyTorch reads these variables once, so imports are the place."""
    for dependency in ("fastapi", "typer"):
        pytest.importorskip(dependency)
    done = subprocess.run(
        [sys.executable, "-c", WATCH_ENVIRONMENT, "fluxcore", "app"],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name not in NEVER_SET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *imported, written = done.stdout.splitlines()
    assert [int(line.split()[1]) > 10 for line in imported] == [True, True]
    assert not NEVER_SET & set(written.split())


def test_a_job_leaves_the_environment_alone(small_pipeline: FluxPipeline) -> None:
    before = dict(os.environ)
    with Audit() as audit:
        assert list(denoise_audited(small_pipeline, small(seed=3), audit))
    assert dict(os.environ) == before
