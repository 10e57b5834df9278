"""The operator audit finds what it looks for: one planted fault for every rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.kernels import plain_attention
from fluxcore.models import flux2
from fluxcore.pipeline import denoise, pipeline
from fluxcore.runtime import Runtime
from tests.mps.audit import LARGEST_BYTES, LARGEST_ELEMENTS, Audit
from tests.mps.operators import support
from tests.mps.pipelines import denoise_audited, noisy_picture
from tests.mps.pretend import DEVICE, PretendTensor

WITHOUT_KERNEL = "mode"
"""An operator that MPS lacks, as of torch 2.15."""


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def rules_broken(work: Callable[[], object], storage: str = "cpu") -> list[str]:
    """The rules that ``work`` breaks, each once, in the order of the first breach."""
    with Audit(storage) as audit:
        work()
    assert audit.ran
    rules = list(dict.fromkeys(violation.rule for violation in audit.violations))
    if rules:
        with pytest.raises(AssertionError, match=rules[0]):
            audit.check()
    else:
        audit.check()
    return rules


def attend(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    k, v = q if k is None else k, q if v is None else v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def convolve(pixels: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(pixels, weight, padding=1)


FAULTS: dict[str, tuple[str, Callable[[], object]]] = {
    "float64 tensor": ("dtype", lambda: ones(3, dtype=torch.float64)),
    "float64 argument": ("dtype", lambda: ones(3).sum(dtype=torch.float64)),
    "cast to float64": ("dtype", lambda: ones(3).double()),
    "float64 scalar of the host": (
        "dtype",
        lambda: ones(3) * torch.tensor(0.5, dtype=torch.float64),
    ),
    "float64 from the host": ("dtype", lambda: torch.ones(3, dtype=torch.float64).to(DEVICE)),
    "complex view": ("dtype", lambda: torch.view_as_complex(ones(3, 2)).real),
    "complex result": ("dtype", lambda: torch.polar(ones(3), ones(3)) * ones(3)),
    "fp8": ("dtype", lambda: ones(3).to(torch.float8_e4m3fn)),
    "no kernel": ("no kernel", lambda: ones(3, 3).mode()),
    "no kernel, in a composite": ("no kernel", lambda: F.pdist(ones(3, 3))),
    "permuted attention": ("attention", lambda: attend(ones(1, 9, 2, 64).transpose(1, 2))),
    "last stride": ("attention", lambda: attend(ones(1, 2, 64, 64).transpose(2, 3))),
    "mixed attention": (
        "attention",
        lambda: attend(ones(1, 2, 9, 64), mask=ones(9, 9, dtype=torch.float16)),
    ),
    "channels-last input": (
        "channels last",
        lambda: convolve(ones(1, 4, 4, 3).permute(0, 3, 1, 2), ones(2, 3, 3, 3)),
    ),
    "channels-last weight": (
        "channels last",
        lambda: convolve(ones(1, 3, 4, 4), ones(2, 3, 3, 3).permute(0, 2, 3, 1).transpose(1, 3)),
    ),
    "channels-last copy": (
        "channels last",
        lambda: ones(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    ),
    "random": ("random", lambda: torch.randn(3, device=DEVICE)),
    "random in place": ("random", lambda: ones(3).normal_()),
    "dropout": ("random", lambda: F.dropout(ones(3), training=True)),
    "upload without waiting": (
        "mixed devices",
        lambda: torch.ones(3).to(DEVICE, non_blocking=True),
    ),
    "download without waiting": ("mixed devices", lambda: ones(3).to("cpu", non_blocking=True)),
    "host operand": ("mixed devices", lambda: ones(3) + torch.ones(3)),
    "beta of zero": (
        "beta",
        lambda: torch.baddbmm(torch.empty(1, 3, 3, device=DEVICE), ones(1, 3, 3), ones(1, 3, 3),
                              beta=0),
    ),
}

HUGE: dict[str, tuple[str, Callable[[], object]]] = {
    "elements": ("size", lambda: ones(LARGEST_ELEMENTS + 1, dtype=torch.bool).logical_not()),
    "elements, expanded": ("size", lambda: ones(2, 1).expand(2, LARGEST_ELEMENTS).sum()),
    "result": ("size", lambda: ones(2**17, 1) @ ones(1, 2**17)),
    "bytes": ("size", lambda: ones(LARGEST_BYTES // 4 + 1)),
    "scores": ("attention", lambda: attend(ones(1, 1, 2048, 512), ones(1, 1, 2**20, 512),
                                           ones(1, 1, 2**20, 512))),
    "rows": ("attention", lambda: attend(ones(1, 1, 2049, 512))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str) -> None:
    rule, work = FAULTS[name]
    assert rules_broken(work) == [rule]


@pytest.mark.parametrize("name", HUGE)
def test_a_tensor_that_fits_no_memory_is_caught(name: str) -> None:
    rule, work = HUGE[name]
    assert rules_broken(work, storage="meta") == [rule]


def test_sound_work_breaks_no_rule() -> None:
    def work() -> None:
        hidden = convolve(ones(1, 3, 4, 4), ones(2, 3, 3, 3))
        hidden = F.group_norm(hidden, 2).flatten(2).transpose(1, 2) * 0.5 + 1
        hidden = hidden.to(torch.float16).contiguous()
        q = F.linear(hidden, ones(64, 2, dtype=torch.float16)).unflatten(-1, (2, 32))
        q = F.silu(q.transpose(1, 2).contiguous())
        mask = torch.ones(16, 16, dtype=torch.bool).to(DEVICE)
        attend(q, q, q, mask).float().cpu()
        torch.baddbmm(ones(1, 3, 3), ones(1, 3, 3), ones(1, 3, 3))
        attend(ones(1, 2, 5000, 128)[:, :, :100], ones(1, 2, 9, 128), ones(1, 2, 9, 128))

    assert rules_broken(work) == ["attention"]
