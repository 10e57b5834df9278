"""The doctor: a sound machine passes, and every planted fault is found."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcore import FluxPipeline, doctor
from fluxcore.bundled import bundled_model
from fluxcore.config import read_checkpoint_config
from fluxcore.doctor import Finding, Status, guarded
from fluxcore.drawn import DrawnPicture
from fluxcore.kernels import Kernels
from fluxcore.runtime import Runtime, choose_runtime

SDPA = F.scaled_dot_product_attention


@pytest.fixture
def runtime() -> Runtime:
    return choose_runtime("cpu", "bfloat16")


def leaking(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Causal attention that sees one token too many."""
    if not how.pop("is_causal", False):
        return SDPA(q, k, v, **how)
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1)
    return SDPA(q, k, v, attn_mask=seen, **how)


def blind_to_strides(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Attention that takes views for what they are not."""
    first = q.transpose(1, 2).reshape(q.shape) if not q.is_contiguous() else q
    return SDPA(first, k, v, **how)


def unmasked(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return SDPA(q, k, v, **{**how, "attn_mask": None})


def not_a_number(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return SDPA(q, k, v, **how) * torch.nan


ATTENTION = {
    "attention": doctor.attention,
    "permuted": doctor.permuted_attention,
    "causal": doctor.causal_attention,
    "VAE": doctor.vae_attention,
}
PLANTED = [
    (leaking, {"causal"}),
    (blind_to_strides, {"attention", "permuted"}),
    (unmasked, {"attention"}),
    (not_a_number, set(ATTENTION)),
]


def test_a_sound_machine_passes(runtime: Runtime) -> None:
    for check in (*ATTENTION.values(), doctor.matrix_rate):
        finding = check(runtime)
        assert finding.status is Status.OK, finding


@pytest.mark.parametrize(
    ("fault", "named"), PLANTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_wrong_attention_is_found(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Tensor], named: set[str]
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", fault)
    found = {name: check(runtime) for name, check in ATTENTION.items()}
    assert {name for name, f in found.items() if f.status is Status.FAULT} == named
    assert all(f.remedy for f in found.values() if f.status is not Status.OK)


def test_on_a_mac_what_fluxd_works_around_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", blind_to_strides)
    mac = Runtime(torch.device("cpu"), "mps", runtime.dtypes, "Apple M3")
    assert doctor.permuted_attention(mac).status is Status.WARNING
    assert doctor.attention(mac).status is Status.OK, "it is given copies"


def test_wrong_products_are_found(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: plain(x, weight) * 1.1)
    assert doctor.matrix_rate(runtime).status is Status.FAULT


def test_a_model_that_a_dtype_draws_wrong_is_found(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Runtime.kernels

    def faulty(self: Runtime) -> Kernels:
        plain = kernels(self)
        if self.dtypes.weights != torch.float16:
            return plain
        wrong = lambda q, k, v, mask: plain.attention(-q, k, v, mask)  # noqa: E731
        return Kernels(wrong, plain.vae_attention, plain.residual_dtype)

    monkeypatch.setattr(Runtime, "kernels", faulty)
    assert doctor.tiny_model(tiny_checkpoint, "cpu", "float32").status is Status.OK
    assert doctor.tiny_model(tiny_checkpoint, "cpu", "float16").status is Status.FAULT


def test_the_bundled_model_draws_the_known_picture_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound = doctor.known_picture("cpu")
    assert sound.status is Status.OK, f"new weights? python -m demo.known_picture ({sound.detail})"
    begin = FluxPipeline.begin_decode

    def shifted(self: FluxPipeline, *args: Any) -> Callable[[], DrawnPicture]:
        decoding = begin(self, *args)
        return lambda: DrawnPicture(np.roll(decoding().pixels, 8, axis=1))

    monkeypatch.setattr(FluxPipeline, "begin_decode", shifted)
    finding = doctor.known_picture("cpu")
    assert finding.status is Status.FAULT
    assert finding.remedy


def test_harmful_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.HARMFUL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert doctor.environment().status is Status.OK
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    finding = doctor.environment()
    assert (finding.status, finding.remedy) == (
        Status.WARNING,
        "unset PYTORCH_ENABLE_MPS_FALLBACK",
    )


@pytest.mark.parametrize(
    ("machine", "macos", "torch_version", "kind", "status", "remedy"),
    [
        ("arm64", "26.1", "2.14.0", "mps", Status.OK, ""),
        ("arm64", "26.1", "2.13.1", "mps", Status.WARNING, "2.14"),
        ("arm64", "13.6", "2.14.0", "mps", Status.FAULT, "update macOS"),
        ("x86_64", "26.1", "2.14.0", "cpu", Status.FAULT, "Apple silicon"),
        ("arm64", "26.1", "2.14.0", "cpu", Status.WARNING, "GPU is not used"),
    ],
)
def test_versions_that_are_known_to_be_bad(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    machine: str,
    macos: str,
    torch_version: str,
    kind: str,
    status: Status,
    remedy: str,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    monkeypatch.setattr(torch, "__version__", torch_version)
    mac = Runtime(torch.device("cpu"), kind, runtime.dtypes, "Apple M3")
    finding = doctor.versions(mac)
    assert finding.status is status
    assert remedy in finding.remedy
    assert f"macOS {macos}" in finding.detail and torch_version in finding.detail


def test_memory_says_what_would_stay(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_checkpoint_config(bundled_model())
    assert doctor.memory(runtime, config).status is Status.OK
    monkeypatch.setattr(Runtime, "available_bytes", lambda self: 600 * 10**6)
    tight = doctor.memory(runtime, config)
    assert tight.status is Status.WARNING
    assert "0.6 GB of memory are free" in tight.detail


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("MPS backend out of memory (...)"), "out of memory"),
        (NotImplementedError("no kernel"), "NotImplementedError: no kernel"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_a_check_that_fails_is_a_fault(error: Exception, told: str) -> None:
    def check() -> Finding:
        raise error

    finding = guarded(check)
    assert finding.status is Status.FAULT
    assert told in finding.detail
    assert finding.remedy
