"""Build a network and fill it from a component's directory, once, where it will stay.

The network is built without storage; each parameter is allocated on its device
in its final dtype and filled from disk piece by piece. Names and shapes of the
whole component are checked before the first byte of weights is read, so there is
never a half-loaded network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fluxcore.config import Qwen3Config, TransformerConfig, VaeConfig
from fluxcore.errors import CheckpointMismatchError
from fluxcore.weights.files import StoredTensor, read_stacked, stored_tensors
from fluxcore.weights.layout import STEMS
from fluxcore.weights.plan import WeightPlan, qwen3_plan, transformer_plan, vae_plan

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far loading one component has come, in bytes on disk."""

    component: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading one component took.

    Attributes:
        parameters: of the whole network, wherever they are.
        read_bytes: bytes of weights read from disk.
        skipped_bytes: bytes on disk that were not read: not needed, or only while in use.
        placed_bytes: bytes that the parameters take on the device.
    """

    component: str
    parameters: int
    read_bytes: int
    skipped_bytes: int
    placed_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and as what the parameters of a network are kept.

    Attributes:
        dtype: of all parameters, but for the names in ``wide``.
        wide_dtype: dtype of parameters whose name ends with an entry of ``wide``.
        channels_last: keep 4-d weights in channels-last order.
    """

    device: torch.device
    dtype: torch.dtype
    wide: tuple[str, ...] = ()
    wide_dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide_dtype if name.endswith(self.wide or ("\0",)) else self.dtype


def weight_plan(config: TransformerConfig | Qwen3Config | VaeConfig) -> WeightPlan:
    """The plan of whichever component a config describes."""
    if isinstance(config, TransformerConfig):
        return transformer_plan(config)
    if isinstance(config, Qwen3Config):
        return qwen3_plan(config)
    return vae_plan(config)


def check_component(plan: WeightPlan, directory: Path) -> None:
    """Compare a component's files with its plan, without reading weights.

    Raises:
        CheckpointError: as ``load_component`` would, but at once.
    """
    _check(directory, plan, stored_tensors(directory, STEMS[directory.name]))


def load_component(
    build: Callable[[], Network],
    plan: WeightPlan,
    directory: Path,
    placement: Placement,
    progress: Callable[[LoadProgress], None] | None = None,
    left_out: tuple[str, ...] = (),
    settle: Callable[[nn.Module, str], int] | None = None,
) -> tuple[Network, LoadReport]:
    """Build a network and fill every parameter from ``directory``.

    Args:
        build: makes the network; called on the meta device, so it costs nothing.
        plan: which published tensors make which parameter.
        directory: the component's directory, named as in the published layout.
        left_out: beginnings of parameters' names that are not to be read, nor placed.
        settle: called with the network and the name of each parameter once it is filled; may
            put something smaller in its place, and returns the bytes freed.

    Raises:
        CheckpointNotFoundError: no weights there.
        CheckpointFileError: a file is corrupt, truncated or unreadable.
        CheckpointMismatchError: tensors are missing, unexpected or misshapen.
    """
    started = time.perf_counter()
    component = directory.name
    stored = stored_tensors(directory, STEMS[component])
    _check(directory, plan, stored)
    parts = {name: s for name, s in plan.parts.items() if not name.startswith(left_out or "\0")}
    total = sum(stored[source.name].bytes for sources in parts.values() for source in sources)
    with torch.device("meta"):
        network = build().eval().requires_grad_(False)

    done, placed = 0, 0
    for name, sources in parts.items():
        tensors = [stored[source.name] for source in sources]
        value = _place(tensors, placement, placement.dtype_of(name))
        _assign(network, name, value)
        done += sum(tensor.bytes for tensor in tensors)
        placed += value.nbytes - (0 if settle is None else settle(network, name))
        del value
        if progress is not None:
            progress(LoadProgress(component, done, total))
    empty = {name for name, tensor in _tensors(network) if tensor.is_meta} - plan.parts.keys()
    assert not empty, f"the plan of {component} leaves parameters without weights: {empty}"
    report = LoadReport(
        component=component,
        parameters=plan.parameters,
        read_bytes=total,
        skipped_bytes=sum(tensor.bytes for tensor in stored.values()) - total,
        placed_bytes=placed,
        seconds=time.perf_counter() - started,
    )
    return network, report


def _check(directory: Path, plan: WeightPlan, stored: dict[str, StoredTensor]) -> None:
    """Compare the headers with the plan; report everything that is wrong at once."""
    expected = {source.name: source for sources in plan.parts.values() for source in sources}
    missing = [name for name in expected if name not in stored]
    unexpected = [
        name for name in stored if name not in expected and not name.startswith(plan.unused or "\0")
    ]
    misshapen = []
    for name, source in expected.items():
        tensor = stored.get(name)
        if tensor is None:
            continue
        if tensor.shape != source.shape:
            misshapen.append(
                f"{name}: expected {list(source.shape)}, the file holds {list(tensor.shape)}"
            )
        elif not tensor.dtype.is_floating_point:
            misshapen.append(f"{name}: expected floating point, the file holds {tensor.dtype}")
    if missing or unexpected or misshapen:
        raise CheckpointMismatchError(directory, missing, unexpected, misshapen)


def _place(tensors: list[StoredTensor], placement: Placement, dtype: torch.dtype) -> Tensor:
    """Stored tensors stacked along dimension 0, on the device."""
    rows = sum(tensor.shape[0] for tensor in tensors)
    shape = (rows, *tensors[0].shape[1:])
    last = placement.channels_last and len(shape) == 4
    layout = torch.channels_last if last else torch.contiguous_format
    value = torch.empty(shape, dtype=dtype, device=placement.device, memory_format=layout)
    read_stacked(tensors, value)
    return value


def _assign(network: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = network.get_submodule(owner_name)
    expected = getattr(owner, leaf)
    assert expected.shape == value.shape, f"{name}: plan {value.shape}, network {expected.shape}"
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        setattr(owner, leaf, value)


def _tensors(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()
