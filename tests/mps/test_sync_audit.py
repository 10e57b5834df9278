"""Inside a denoising step the host never waits for the device, and few kernels are started."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fluxcore import FluxPipeline, GenerationParams
from fluxcore import kernels as plain_kernels
from fluxcore.pipeline import denoise
from tests.mps.audit import Audit, Ran
from tests.mps.conftest import AuditedRun, Waits
from tests.mps.pipelines import denoise_audited
from tests.mps.pretend import DEVICE

WAITING = {"upload", "download", "wait"}

MOST_KERNELS = {"float16": (59, 25, 11), "bfloat16": (33, 17, 9)}
"""Kernels of a double block, of a single block, and of the rest of a step, per dtype.
float16 casts to and from its float32 residual stream, and scales rows that would overflow.
One of the rest copies the queries of the last block, of which only some are asked for.
Fewer are welcome: lower these then."""


def small(steps: int) -> GenerationParams:
    return GenerationParams(prompt="a fox", width=64, height=64, steps=steps, guidance=1.0, seed=0)


def waited(ran: list[Ran]) -> set[str]:
    return {each.operator for each in ran if each.kind in WAITING}


def test_no_step_waits_for_the_device(audited: AuditedRun) -> None:
    steps = [each for each in audited.slices if each.stage == "denoise"]
    assert [step.step for step in steps] == [1, 2]
    assert not waited(steps[1].ran)
    # the first also sets up: noise, noise levels, position tables and the mask go up
    assert {each.kind for each in steps[0].ran} & WAITING == {"upload"}


def test_only_the_picture_comes_back(audited: AuditedRun) -> None:
    back = [
        (each.stage, ran.operator, ran.kind)
        for each in audited.slices
        for ran in each.ran
        if ran.kind in ("download", "wait")
    ]
    # whether it is sound, and its bytes
    assert back == [("decode", "copy_", "download")] * 2


def test_the_host_waits_on_purpose_once_a_step(audited: AuditedRun) -> None:
    counts = zip([0, *audited.waits], audited.waits, strict=False)
    spent = {
        (each.stage, each.step): after - before
        for each, (before, after) in zip(audited.slices, counts, strict=True)
    }
    # the end of denoising is noticed in the last slice, with nothing left to wait for
    assert spent.pop(("decode", 2)) <= 2
    assert set(spent.values()) == {1}


def test_all_steps_run_the_same(small_pipeline: FluxPipeline, waits: Waits) -> None:
    before = waits.count
    with Audit() as audit:
        first, *others = [step.ran for step in denoise_audited(small_pipeline, small(4), audit)]
    assert len(others) == 3
    assert others[0] == others[1] == others[2]
    assert first[-len(others[0]) :] == others[0]
    assert waits.count == before


def test_a_step_starts_no_more_kernels_than_it_did(audited: AuditedRun) -> None:
    counted = kernels(audited.pipe)
    for now, most in zip(counted, MOST_KERNELS[audited.dtype], strict=True):
        assert 0 < now <= most


def kernels(pipe: FluxPipeline) -> tuple[int, int, int]:
    """Kernels of a double block, of a single block and of the rest of a step."""
    transformer = pipe.transformer
    doubles, singles = transformer.double_blocks, transformer.single_blocks

    def count(double: nn.ModuleList, single: nn.ModuleList) -> int:
        transformer.double_blocks, transformer.single_blocks = double, single
        try:
            with Audit() as audit:
                _, step = denoise_audited(pipe, small(2), audit)
        finally:
            transformer.double_blocks, transformer.single_blocks = doubles, singles
        return sum(ran.kind == "kernel" for ran in step.ran)

    whole = count(doubles, singles)
    a_double = whole - count(doubles[1:], singles)
    a_single = whole - count(doubles, singles[1:])
    return a_double, a_single, whole - len(doubles) * a_double - len(singles) * a_single


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.amax().tolist(),
    "truth": lambda x: bool(torch.isfinite(x).all()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "upload": lambda x: x + torch.ones(1).to(DEVICE),
    "constant": lambda x: x + torch.tensor([1.0], device=DEVICE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_waiting_in_a_step_is_caught(
    small_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plain = denoise.euler_step

    def faulty(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
        FAULTS[fault](velocity)
        return plain(latents, velocity, sigma, sigma_next)

    monkeypatch.setattr(denoise, "euler_step", faulty)
    with Audit() as audit:
        _, step = denoise_audited(small_pipeline, small(2), audit)
    assert waited(step.ran)


def test_one_more_kernel_in_a_block_is_caught(
    small_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernels(small_pipeline)
    plain = plain_kernels.swiglu
    monkeypatch.setattr(plain_kernels, "swiglu", lambda x, *rest: plain(x.clone(), *rest))
    after = kernels(small_pipeline)
    # a double block has two streams
    assert after == (before[0] + 2, before[1] + 1, before[2])
