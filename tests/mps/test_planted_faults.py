"""The operator audit finds what it looks for: planted faults for every rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.kernels import plain_attention
from fluxcore.pipeline import denoise, pipeline
from fluxcore.runtime import Runtime
from tests.mps.audit import LARGEST_BYTES, LARGEST_ELEMENTS, RULES, Audit
from tests.mps.operators import support
from tests.mps.pipelines import denoise_audited, noisy_picture
from tests.mps.pretend import DEVICE

Work = Callable[[], object]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def channels_last(*shape: int) -> Tensor:
    batch, channels, height, width = shape
    return ones(batch, height, width, channels).permute(0, 3, 1, 2)


def attend(q: Tensor, keys: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    keys = q if keys is None else keys
    return F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask)


FAULTS: dict[str, list[Work]] = {
    "dtype": [
        lambda: ones(3, dtype=torch.float64),
        lambda: ones(3).sum(dtype=torch.float64),
        lambda: ones(3).double(),
        lambda: ones(3) * torch.tensor(0.5, dtype=torch.float64),
        lambda: torch.ones(3, dtype=torch.float64).to(DEVICE),
        lambda: torch.view_as_complex(ones(3, 2)).real,
        lambda: torch.polar(ones(3), ones(3)) * ones(3),
        lambda: ones(3).to(torch.float8_e4m3fn),
    ],
    "attention": [
        lambda: attend(ones(1, 9, 2, 64).transpose(1, 2)),  # not contiguous
        lambda: attend(ones(1, 2, 64, 64).transpose(2, 3)),  # last stride
        lambda: attend(ones(1, 2, 9, 64, dtype=torch.float16), mask=ones(9, 9)),
    ],
    "channels last": [
        lambda: F.conv2d(channels_last(1, 3, 4, 5), ones(2, 3, 3, 3)),
        lambda: F.conv2d(ones(1, 3, 4, 5), channels_last(2, 3, 3, 3)),
        lambda: F.interpolate(channels_last(1, 3, 4, 5), scale_factor=2.0),
        lambda: ones(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ],
    "random": [
        lambda: torch.randn(3, device=DEVICE),
        lambda: ones(3).normal_(),
        lambda: F.dropout(ones(3), training=True),
    ],
    "mixed devices": [
        lambda: torch.ones(3).to(DEVICE, non_blocking=True),
        lambda: ones(3).to("cpu", non_blocking=True),
        lambda: ones(3) + torch.ones(3),
    ],
    "beta": [
        lambda: torch.baddbmm(ones(1, 3, 3), ones(1, 3, 3), ones(1, 3, 3), beta=0),
    ],
}

TOO_LARGE: dict[str, list[Work]] = {
    "size": [
        lambda: ones(LARGEST_ELEMENTS + 1, dtype=torch.bool),
        lambda: ones(2, 1).expand(2, LARGEST_ELEMENTS).sum(),
        lambda: ones(2**17, 1) @ ones(1, 2**17),
        lambda: ones(LARGEST_BYTES // 4 + 1),
    ],
    "attention": [
        lambda: attend(ones(1, 1, 2048, 512), ones(1, 1, 2**20, 512)),  # scores
        lambda: attend(ones(1, 1, 2049, 512)),  # rows
    ],
}

LACKING: dict[str, Work] = {
    "mode": lambda: ones(3, 3).mode(),
    "_pdist_forward": lambda: F.pdist(ones(3, 3)),  # inside of a composite
    "heaviside": lambda: torch.heaviside(ones(3), ones(3)),
}
"""Operators that some release of PyTorch has no MPS kernel for."""


def rules_broken(work: Work, storage: str = "cpu") -> set[str]:
    """The rules that ``work`` breaks; ``check`` must name each of them."""
    with Audit(storage) as audit:
        work()
    assert audit.ran
    rules = {violation.rule for violation in audit.violations}
    if not rules:
        audit.check()
    for rule in rules:
        with pytest.raises(AssertionError, match=f"(?m)^{rule}: "):
            audit.check()
    return rules


def cases(faults: dict[str, list[Work]]) -> list[object]:
    return [
        pytest.param(rule, work, id=f"{rule} {number}")
        for rule, works in faults.items()
        for number, work in enumerate(works, start=1)
    ]


def test_every_rule_has_a_planted_fault() -> None:
    assert set(RULES) == set(FAULTS) | set(TOO_LARGE)


@pytest.mark.parametrize(("rule", "work"), cases(FAULTS))
def test_a_fault_is_caught(rule: str, work: Work) -> None:
    assert rules_broken(work) == {rule}


@pytest.mark.parametrize(("rule", "work"), cases(TOO_LARGE))
def test_what_fits_no_memory_is_caught(rule: str, work: Work) -> None:
    assert rules_broken(work, storage="meta") == {rule}


def test_an_operator_without_kernel_is_caught() -> None:
    lacking = [name for name in LACKING if support(name) is None]
    assert lacking, "MPS has all of these now; plant others"
    for name in lacking:
        assert rules_broken(LACKING[name]) == {"no kernel"}, name


def test_an_operator_of_another_library_is_caught() -> None:
    with torch.library._scoped_library("planted", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CPU")
        assert rules_broken(lambda: torch.ops.planted.twice(ones(3))) == {"no kernel"}


def test_sound_work_breaks_no_rule() -> None:
    def work() -> None:
        hidden = F.conv2d(ones(1, 3, 4, 4), ones(2, 3, 3, 3), padding=1)
        hidden = F.group_norm(hidden, 2).flatten(2).transpose(1, 2) * 0.5 + torch.tensor(1.0)
        hidden = F.linear(hidden.to(torch.float16), ones(64, 2, dtype=torch.float16))
        q = F.silu(hidden).unflatten(-1, (2, 32)).transpose(1, 2).contiguous()
        attend(q, mask=torch.ones(16, 16, dtype=torch.bool).to(DEVICE)).float().cpu()
        torch.baddbmm(ones(1, 3, 3), ones(1, 3, 3), ones(1, 3, 3))

    assert rules_broken(work) == set()


def test_fused_attention_has_no_limit_on_scores() -> None:
    assert rules_broken(lambda: attend(ones(1, 24, 60_000, 128)), storage="meta") == set()


def test_work_on_the_host_is_not_judged() -> None:
    with Audit() as audit:
        torch.randn(3, dtype=torch.float64).mode()
        torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last)
        torch.polar(torch.ones(3), torch.ones(3)).numpy()
    assert not audit.ran
    assert not audit.violations


def in_double(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    moved = latents.double() + (sigma_next - sigma) * velocity
    return moved.to(velocity.dtype)


def noise_on_the_device(seed: int, channels: int, grid: tuple[int, int], *, pinned: bool) -> Tensor:
    return torch.randn((1, grid[0] * grid[1], channels), device=DEVICE)


def strided_attention(pipe: FluxPipeline, patch: pytest.MonkeyPatch) -> None:
    for block in (*pipe.transformer.double_blocks, *pipe.transformer.single_blocks):
        patch.setattr(block, "attention", plain_attention)


PIPELINE_FAULTS: dict[str, Callable[[FluxPipeline, pytest.MonkeyPatch], None]] = {
    "dtype": lambda pipe, patch: patch.setattr(denoise, "euler_step", in_double),
    "random": lambda pipe, patch: patch.setattr(pipeline, "draw_noise", noise_on_the_device),
    "attention": strided_attention,
    "channels last": lambda pipe, patch: patch.setattr(Runtime, "channels_last", True),
}


@pytest.mark.parametrize("rule", PIPELINE_FAULTS)
def test_a_fault_in_the_pipeline_is_caught(
    small_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    params = GenerationParams(
        prompt="a fox",
        width=64,
        height=64,
        steps=1,
        guidance=1.0,
        references=(noisy_picture(64, 64, 0),),
    )
    PIPELINE_FAULTS[rule](small_pipeline, monkeypatch)
    with Audit() as audit:
        assert len(list(denoise_audited(small_pipeline, params, audit))) == 1
    assert {violation.rule for violation in audit.violations} == {rule}
