"""CUDA graphs: a network's launches recorded once per shape, and played back at once.

Owns the recordings, their number and their memory. A call on a shape that is new runs
as it is, on the tensors that the recording will read, and is then recorded; later calls
copy their inputs to them, play the recording, and copy the result out. The kernels are
the same ones in the same order, so the result is the same bit for bit. Knows nothing of
networks.

Source of the rules (fixed addresses, one memory pool for graphs that never run at the
same time): PyTorch documentation, "CUDA semantics", "CUDA Graphs".
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from fluxcore.runtime.memory import is_out_of_memory

logger = logging.getLogger(__name__)

Function = Callable[..., Any]
Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Record what a function does: its result, which stays where it is, and how to do it again."""

NOT_RECORDABLE = re.compile(r".*captur", re.IGNORECASE)
"""The first line of all that CUDA (its errors 900 to 908) and PyTorch say of work that cannot be
recorded; others may name functions of PyTorch's."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """One function on one shape.

    Attributes:
        inputs: where it reads, in the order of the call's tensors.
        result: where it writes.
    """

    inputs: list[Tensor]
    result: Any
    play: Callable[[], None]


class Graphs:
    """The recordings of all networks of one pipeline; the least recently used goes first.

    Used from the thread that owns the device.

    Args:
        limit: how many are kept.
        record: how to record.
    """

    def __init__(self, limit: int, record: Record) -> None:
        self.limit = limit
        self._record = record
        self._kept: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._refused: set[tuple[Any, ...]] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def describe(self) -> str:
        """How many are kept at most, and for how many shapes there can be none."""
        refused = f" (shapes without one: {len(self._refused)})" if self._refused else ""
        return f"{self.limit}{refused}"

    def wrap(self, function: Function, most_tokens: int) -> Function:
        """The function, recorded on every shape that it is called with.

        It must be pure, take contiguous tensors and plain values, and keep no tensor of its own.

        Args:
            most_tokens: calls whose first argument is longer than this in its second
                dimension run as they are: the device is busy for longer than launching
                takes, and a recording of them would hold much memory.
        """

        def call(*args: Any) -> Any:
            if args[0].shape[1] > most_tokens:
                return function(*args)
            return self._call(function, args)

        return call

    def has(self, function: Function, args: tuple[Any, ...]) -> bool:
        """Whether a call would be played back."""
        return _key(function, *tree_flatten(args)) in self._kept

    def clear(self) -> None:
        """Drop all recordings and their memory; they are made again when needed."""
        self._kept.clear()
        self._refused.clear()

    def _call(self, function: Function, args: tuple[Any, ...]) -> Any:
        leaves, form = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors), "one layout for each shape"
        key = _key(function, leaves, form)
        found = self._kept.get(key)
        if key in self._refused:
            return function(*args)
        if found is None:
            return self._add(key, function, leaves, form)
        self._kept.move_to_end(key)
        for place, tensor in zip(found.inputs, tensors, strict=True):
            place.copy_(tensor)
        found.play()
        return tree_map_only(Tensor, Tensor.clone, found.result)

    def _add(
        self, key: tuple[Any, ...], function: Function, leaves: list[Any], form: TreeSpec
    ) -> Any:
        """Run a call, so that all that it needs is in place, and record it; what it gave.

        It runs on the recording's own inputs: a compiler makes another form for tensors that
        lie otherwise in memory, and none can be made while recording.

        Without a recording goes on only what memory is short for or what cannot be recorded.
        Before it records, CUDA waits for what was launched: a fault of the call itself may come
        out there, and what the call gave is then worth nothing.
        """
        while len(self._kept) >= self.limit:
            self._kept.popitem(last=False)
        places = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args = tree_unflatten(places, form)
        first = function(*args)
        try:
            result, play = self._record(lambda: function(*args))
        except RuntimeError as error:
            if not (is_out_of_memory(error) or NOT_RECORDABLE.match(str(error))):
                raise
            self._refused.add(key)
            logger.warning("no CUDA graph for this shape, which is drawn without: %s", error)
            return first
        inputs = [place for place in places if isinstance(place, Tensor)]
        self._kept[key] = _Recording(inputs, result, play)
        return first


def _key(function: Function, leaves: list[Any], form: TreeSpec) -> tuple[Any, ...]:
    """What must be equal for a recording to fit."""
    return (function, form, *(_kind(leaf) for leaf in leaves))


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf


class CudaRecorder:
    """Records into graphs that share one pool of memory, as they never run at the same time.

    The pool lives as long as one of them does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            pool = next((graph.pool() for graph in self._made), None)
            graph = torch.cuda.CUDAGraph()
            # Other threads may ask for memory figures meanwhile. A recording that fails as it ends
            # does not go back to the stream before.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                result = function()
        self._made.add(graph)
        return result, graph.replay
