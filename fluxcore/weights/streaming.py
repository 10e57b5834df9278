"""Weights that are read from the checkpoint's files each time they are needed.

Owns how a layer's published tensors become the contents of one buffer, and an embedding
that reads single rows. The files are read through the system's page cache rather than
mapped: mapped pages count against the process, read ones belong to the system, which
takes them back when memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxcore.runtime.streaming import ALIGNMENT_BYTES, Part, StreamedLayer
from fluxcore.weights.files import StoredTensor, read_stacked, stored_tensors
from fluxcore.weights.layout import STEMS
from fluxcore.weights.load import Placement
from fluxcore.weights.plan import WeightPlan

Ordering = Callable[[nn.Module, str], Callable[[Tensor], None] | None]
"""(network, parameter) -> as ``Runtime.ordering``."""


def streamed_layers(
    network: nn.Module,
    plan: WeightPlan,
    directory: Path,
    placement: Placement,
    names: Sequence[str],
    ordering: Ordering,
) -> list[StreamedLayer]:
    """The submodules called ``names``, whose parameters ``load_component`` left out."""
    stored = stored_tensors(directory, STEMS[directory.name])
    return [_layer(network, plan, stored, placement, name, ordering) for name in names]


def _layer(
    network: nn.Module,
    plan: WeightPlan,
    stored: dict[str, StoredTensor],
    placement: Placement,
    name: str,
    ordering: Ordering,
) -> StreamedLayer:
    parts: list[Part] = []
    orders: list[Callable[[Tensor], None] | None] = []
    sources: list[list[StoredTensor]] = []
    end = 0
    for full_name, needed in plan.parts.items():
        if not full_name.startswith(f"{name}."):
            continue
        tensors = [stored[source.name] for source in needed]
        rows = sum(tensor.shape[0] for tensor in tensors)
        part = Part(
            name=full_name.removeprefix(f"{name}."),
            offset=-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES,
            shape=(rows, *tensors[0].shape[1:]),
            dtype=placement.dtype_of(full_name),
        )
        end = part.offset + part.bytes
        parts.append(part)
        sources.append(tensors)
        orders.append(ordering(network, full_name))

    def fill(buffer: Tensor) -> None:
        for part, tensors, order in zip(parts, sources, orders, strict=True):
            values = part.in_buffer(buffer)
            read_stacked(tensors, values)
            if order is not None:
                order(values)

    return StreamedLayer(network.get_submodule(name), tuple(parts), end, fill)


def stored_embedding(
    plan: WeightPlan, directory: Path, placement: Placement, name: str
) -> StoredEmbedding:
    """The embedding of ``name``, left out by ``load_component``."""
    parameter = f"{name}.weight"
    (source,) = plan.parts[parameter]
    stored = stored_tensors(directory, STEMS[directory.name])
    return StoredEmbedding(stored[source.name], placement.dtype_of(parameter))


class StoredEmbedding(nn.Module):
    """An embedding table that stays on disk: only the rows of the given ids are read.

    Shapes: ids [B, L] int64 -> [B, L, D] on the ids' device.
    """

    def __init__(self, table: StoredTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._table, self._dtype = table, dtype

    def forward(self, ids: Tensor) -> Tensor:
        wanted, place = ids.cpu().unique(return_inverse=True)
        width = self._table.shape[1]
        rows = torch.empty(len(wanted), width, dtype=self._table.dtype)
        for row, number in zip(rows, wanted.tolist(), strict=True):
            offset = self._table.offset + number * width * self._table.dtype.itemsize
            replace(self._table, offset=offset, shape=(width,)).read_into(row)
        return rows.to(self._dtype)[place].to(ids.device)
