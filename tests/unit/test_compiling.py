"""Whether networks are compiled, what is said where they cannot be, and that they draw the same."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fluxcore.config import TEXT_TOKENS, TransformerConfig
from fluxcore.errors import DeviceUnavailableError
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.models.flux2 import DoubleBlock, Modulation, SingleBlock
from fluxcore.runtime import choose_runtime, keep_compiled
from fluxcore.runtime.attention import cudnn_attention, wide_attention
from fluxcore.runtime.compiling import compile_block, compiles
from fluxcore.runtime.quantised import FP8, quantise


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(triton, compilers) -> a machine that has them."""

    def pretend(*, triton: bool, compilers: tuple[str, ...]) -> None:
        real = importlib.util.find_spec

        def find(name: str) -> object:
            return triton or None if name == "triton" else real(name)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.delenv("CXX", raising=False)

    return pretend


def test_auto_compiles_on_cuda_alone(tools: Any) -> None:
    tools(triton=True, compilers=("gcc", "g++"))
    assert compiles("cuda", "auto")
    assert not compiles("cpu", "auto")
    assert not compiles("mps", "auto")
    assert compiles("cpu", "on")
    for kind in ("cuda", "cpu", "mps"):
        assert not compiles(kind, "off")


@pytest.mark.parametrize(
    ("triton", "compilers", "missing"),
    [(False, ("gcc",), "triton is missing"), (True, (), "no C compiler"), (True, ("x",), "no C")],
)
def test_what_is_missing_is_said(
    tools: Any,
    caplog: pytest.LogCaptureFixture,
    triton: bool,
    compilers: tuple[str, ...],
    missing: str,
) -> None:
    tools(triton=triton, compilers=compilers)
    with caplog.at_level(logging.WARNING):
        assert not compiles("cuda", "auto")
    assert missing in caplog.text
    with pytest.raises(DeviceUnavailableError, match=missing):
        compiles("cuda", "on")


def test_compiling_cannot_be_forced_where_it_is_not_supported(tools: Any) -> None:
    tools(triton=True, compilers=())
    with pytest.raises(DeviceUnavailableError, match="not supported on MPS"):
        compiles("mps", "on")
    with pytest.raises(DeviceUnavailableError, match=r"no C\+\+ compiler"):
        compiles("cpu", "on")


def test_a_compiler_may_be_named(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(triton=True, compilers=("/opt/bin/icx",))
    monkeypatch.setenv("CC", "/opt/bin/icx")
    assert compiles("cuda", "on")


def test_what_is_compiled_is_kept_privately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_compiled(tmp_path / "unused")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert not (tmp_path / "unused").exists()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled(tmp_path / "a" / "compiled")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "a" / "compiled")
    assert stat.S_IMODE((tmp_path / "a" / "compiled").stat().st_mode) == 0o700


def test_nothing_is_kept_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    keep_compiled(shared)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "chmod go-w" in caplog.text


def test_the_runtime_says_how_networks_run() -> None:
    told = choose_runtime("cpu", "float32", cuda_graphs=24).describe()
    assert (told["precision"], told["compiled"], told["cuda_graphs"]) == ("float32", "no", "0")


CONFIG = TransformerConfig(
    heads=4,
    head_width=16,
    double_blocks=1,
    single_blocks=1,
    mlp_ratio=1.5,
    in_channels=16,
    out_channels=16,
    text_width=96,
    time_channels=32,
    norm_eps=1e-6,
    rope_axes=(4, 4, 4, 4),
    rope_theta=2000.0,
)


def shaped(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without values, for which no GPU is needed."""
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_one_form_serves_all_sizes_with_the_gpu_s_own_operations(precision: str) -> None:
    """Traced without a GPU and without values: no size may be built into what is compiled."""
    kernels = Kernels(cudnn_attention, wide_attention)
    with torch.device("meta"):
        double, single = DoubleBlock(CONFIG, kernels), SingleBlock(CONFIG, kernels)
    for block in (double, single):
        block.bfloat16().requires_grad_(False)
        if precision == "fp8":
            quantise([block], FP8)
        block.compile(fullgraph=True, dynamic=True, backend="eager")
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    mod = Modulation(*(shaped(count, 1, 64) for count in (6, 6, 3, 2)))
    with torch.inference_mode():
        for tokens in (256, 1024, TEXT_TOKENS, 4096):
            pe = (shaped(tokens + TEXT_TOKENS, 16, dtype=torch.float32),) * 2
            img, txt = double(shaped(1, tokens, 64), shaped(1, TEXT_TOKENS, 64), mod, pe)
            x = single(torch.cat((txt, img), dim=1), mod.single, pe)
            assert (x.shape, x.dtype) == ((1, tokens + TEXT_TOKENS, 64), torch.bfloat16)
    assert counters["unique_graphs"] - before == 2, "one for each kind of block"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # PyTorch's own
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler on this machine")
def test_compiled_blocks_agree_at_every_size_and_are_compiled_once() -> None:
    torch.manual_seed(0)
    blocks = [SingleBlock(CONFIG, Kernels(plain_attention, plain_attention)) for _ in range(3)]
    compiled = nn.ModuleList(blocks).eval().requires_grad_(False)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for tokens in (40, 72, 24):
        x, mod = torch.randn(1, tokens, 64), torch.randn(3, 1, 64)
        pe = (torch.randn(tokens, 16), torch.randn(tokens, 16))
        with torch.inference_mode():
            for block in compiled:
                block._compiled_call_impl = None
                exact = block(x, mod, pe)
                compile_block(block, sizes_vary=True)
                apart = float((block(x, mod, pe) - exact).norm() / exact.norm())
                assert apart < 2e-6, "measured: 2e-7"
    assert counters["unique_graphs"] - before == 1
