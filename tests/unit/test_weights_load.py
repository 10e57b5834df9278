"""Filling a network from its files: fusing, placing, reports, and one error for all faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fluxcore.errors import CheckpointMismatchError
from fluxcore.weights import LoadProgress, LoadReport, Source, WeightPlan, load_component
from fluxcore.weights.load import Placement

CPU = torch.device("cpu")
FLOAT32 = Placement(CPU, torch.float32)
PLAN = WeightPlan(
    {
        "qkv.weight": (Source("to_q", (2, 4)), Source("to_k", (3, 4)), Source("to_v", (1, 4))),
        "conv.weight": (Source("conv.weight", (4, 3, 3, 3)),),
        "conv.bias": (Source("conv.bias", (4,)),),
        "inner.norm": (Source("norm", (5,)),),
        "mean": (Source("bn.mean", (6,)),),
    },
    unused=("skipped.", "bn.count"),
)
UNUSED = {"skipped.9.weight": torch.ones(7, 3), "bn.count": torch.tensor(3)}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(5))


class Network(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.inner = Inner()
        self.register_buffer("mean", torch.zeros(6))


def published(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors as a checkpoint would hold them."""
    generator = torch.Generator().manual_seed(0)
    sources = [source for sources in PLAN.parts.values() for source in sources]
    return {s.name: torch.randn(s.shape, generator=generator).to(dtype) for s in sources}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "vae").mkdir()
    return tmp_path / "vae"


def load(
    directory: Path,
    tensors: dict[str, Tensor],
    placement: Placement = FLOAT32,
    progress: Callable[[LoadProgress], None] | None = None,
) -> tuple[Network, LoadReport]:
    save_file(tensors, directory / "diffusion_pytorch_model.safetensors")
    return load_component(Network, PLAN, directory, placement, progress)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("placed", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_parameters_are_the_stack_of_their_sources(
    directory: Path, stored: torch.dtype, placed: torch.dtype, channels_last: bool
) -> None:
    tensors = published(stored)
    network, _ = load(directory, tensors, Placement(CPU, placed, channels_last=channels_last))
    stack = torch.cat((tensors["to_q"], tensors["to_k"], tensors["to_v"]))
    for value, expected in (
        (network.qkv.weight, stack),
        (network.conv.weight, tensors["conv.weight"]),
        (network.conv.bias, tensors["conv.bias"]),
        (network.inner.norm, tensors["norm"]),
        (network.mean, tensors["bn.mean"]),
    ):
        assert value is not None
        assert value.dtype == placed
        assert torch.equal(value, expected.to(placed))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert network.conv.weight.is_contiguous(memory_format=layout)
    assert network.qkv.weight.is_contiguous()


def test_a_loaded_network_is_for_inference(directory: Path) -> None:
    network, _ = load(directory, published())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert set(dict(network.named_buffers())) == {"mean"}


def test_wide_parameters_are_kept_in_their_own_dtype(directory: Path) -> None:
    placement = Placement(CPU, torch.float16, wide=("norm", "bias"), wide_dtype=torch.float32)
    network, report = load(directory, published(), placement)
    wide = {name for name, value in network.named_parameters() if value.dtype == torch.float32}
    assert wide == {"inner.norm", "conv.bias"}
    assert network.qkv.weight.dtype == torch.float16
    assert report.placed_bytes == 2 * report.parameters + 2 * (5 + 4)


def test_the_report_counts_what_was_read_skipped_and_placed(directory: Path) -> None:
    _, report = load(directory, published() | UNUSED)
    elements = 24 + 108 + 4 + 5 + 6
    assert report.component == "vae"
    assert report.parameters == elements
    assert report.read_bytes == 2 * elements
    assert report.placed_bytes == 4 * elements
    assert report.skipped_bytes == 4 * 21 + 8
    assert report.seconds > 0


def test_progress_rises_to_the_bytes_that_are_read(directory: Path) -> None:
    told: list[LoadProgress] = []
    _, report = load(directory, published() | UNUSED, progress=told.append)
    done = [progress.done_bytes for progress in told]
    assert len(done) == len(PLAN.parts)
    assert done == sorted(set(done))
    assert done[-1] == report.read_bytes
    assert {progress.total_bytes for progress in told} == {report.read_bytes}
    assert {progress.component for progress in told} == {"vae"}


def test_all_faults_are_listed_in_one_error_and_nothing_is_read(directory: Path) -> None:
    tensors = published() | UNUSED
    del tensors["to_k"], tensors["bn.mean"]
    tensors |= {"surplus.one": torch.ones(1), "surplus.two": torch.ones(1)}
    tensors["to_q"] = torch.ones(4, 2)
    tensors["conv.bias"] = torch.ones(4, 1)
    tensors["norm"] = torch.ones(5, dtype=torch.int32)
    told: list[LoadProgress] = []
    with pytest.raises(CheckpointMismatchError) as caught:
        load(directory, tensors, progress=told.append)
    error = caught.value
    assert told == []
    assert error.directory == directory
    assert error.missing == ("to_k", "bn.mean")
    assert set(error.unexpected) == {"surplus.one", "surplus.two"}
    assert len(error.misshapen) == 3
    message = str(error)
    for words in (
        str(directory),
        "missing (2)",
        "unexpected (2)",
        "misshapen (3)",
        "to_q: expected [2, 4], the file holds [4, 2]",
        "conv.bias: expected [4], the file holds [4, 1]",
        "norm: expected floating point, the file holds torch.int32",
        "remedy",
    ):
        assert words in message


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_only_the_faults_that_are_there_are_listed(directory: Path, fault: str) -> None:
    tensors = published()
    if fault == "missing":
        del tensors["norm"]
    elif fault == "unexpected":
        tensors["conv.scale"] = torch.ones(1)
    else:
        tensors["norm"] = torch.ones(6)
    with pytest.raises(CheckpointMismatchError) as caught:
        load(directory, tensors)
    for kind in ("missing", "unexpected", "misshapen"):
        assert (f"{kind} (1)" in str(caught.value)) == (kind == fault)


def test_a_long_list_of_faults_is_cut_in_the_message_only(directory: Path) -> None:
    surplus = {f"surplus.{i:03}": torch.ones(1) for i in range(100)}
    with pytest.raises(CheckpointMismatchError) as caught:
        load(directory, published() | surplus)
    assert len(caught.value.unexpected) == 100
    assert "unexpected (100)" in str(caught.value)
    assert "... and 88 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 20


def test_an_empty_file_of_weights_lacks_them_all(directory: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"missing \(7\)"):
        load(directory, {})


def test_a_prefix_is_not_an_unused_name_of_its_own(directory: Path) -> None:
    """``bn.count`` is known and unused; ``skipped`` without its dot is neither."""
    with pytest.raises(CheckpointMismatchError, match="skippedtoo"):
        load(directory, published() | {"skippedtoo": torch.ones(1)})


def test_without_unused_names_every_other_name_is_unexpected(directory: Path) -> None:
    save_file(published() | UNUSED, directory / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointMismatchError) as caught:
        load_component(Network, replace(PLAN, unused=()), directory, FLOAT32)
    assert set(caught.value.unexpected) == set(UNUSED)


def test_a_plan_that_forgets_a_parameter_is_a_fault_of_ours(directory: Path) -> None:
    """Never a network with a parameter that has no values."""
    parts = {name: sources for name, sources in PLAN.parts.items() if name != "mean"}
    save_file(published(), directory / "diffusion_pytorch_model.safetensors")
    with pytest.raises(AssertionError, match="mean"):
        load_component(Network, WeightPlan(parts, unused=("bn.",)), directory, FLOAT32)


def test_loading_does_not_map_the_file(directory: Path) -> None:
    """A later change of the file does not reach the weights that were loaded."""
    network, _ = load(directory, published(torch.float32))
    before = network.qkv.weight.clone()
    with (directory / "diffusion_pytorch_model.safetensors").open("r+b") as stream:
        stream.write(b"\xff" * 4096)
    assert torch.equal(network.qkv.weight, before)
