"""Recordings of calls by shape; recording and playing are stood in for by calling again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fluxcore.runtime.graphs import Graphs


class Recorder:
    """Plays by calling the function again on the recorded places, as a GPU would."""

    def __init__(self) -> None:
        self.recorded = 0
        self.played = 0
        self.failure: Exception | None = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.failure is not None:
            raise self.failure
        self.recorded += 1
        result = function()

        def play() -> None:
            self.played += 1
            found = function()
            for place, value in zip(result, found, strict=True):
                place.copy_(value)

        return result, play


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def total(x: Tensor, pair: Pair, factor: int) -> tuple[Tensor, Tensor]:
    return x * factor + pair.left, pair.right.clone()


def inputs(tokens: int, value: float, factor: int = 2) -> tuple[Tensor, Pair, int]:
    x = torch.full((1, tokens, 3), value)
    return x, Pair(x + 1, x + 2), factor


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_call_gives_what_the_function_gives(recorder: Recorder) -> None:
    call = Graphs(8, recorder).wrap(total, most_tokens=100)
    for value in (1.0, 2.0, -3.0):
        for tokens in (4, 5):
            for factor in (2, 3):
                args = inputs(tokens, value, factor)
                assert same(call(*args), total(*args))
    assert recorder.recorded == 4, "one for each shape and plain value"
    assert recorder.played == 8


def test_dtypes_and_functions_are_told_apart(recorder: Recorder) -> None:
    graphs = Graphs(8, recorder)
    call, other = graphs.wrap(total, 100), graphs.wrap(lambda x, _, __: (x, x), 100)
    x, pair, factor = inputs(4, 1.0)
    call(x, pair, factor)
    assert same(other(x, pair, factor), (x, x))
    double = (x.double(), Pair(pair.left.double(), pair.right.double()), factor)
    assert same(call(*double), total(*double))
    assert len(graphs) == 3


def test_results_outlive_the_next_call(recorder: Recorder) -> None:
    call = Graphs(8, recorder).wrap(total, most_tokens=100)
    results = [call(*inputs(4, value)) for value in (1.0, 2.0, 3.0, 4.0)]
    for value, found in zip((1.0, 2.0, 3.0, 4.0), results, strict=True):
        assert same(found, total(*inputs(4, value)))


def test_the_least_recently_used_goes_first(recorder: Recorder) -> None:
    graphs = Graphs(2, recorder)
    call = graphs.wrap(total, most_tokens=100)
    for tokens in (1, 2, 1, 3, 1):
        call(*inputs(tokens, 1.0))
    assert (len(graphs), recorder.recorded) == (2, 3)
    call(*inputs(2, 1.0))
    assert recorder.recorded == 4, "2 had gone when 3 came"
    graphs.clear()
    assert len(graphs) == 0
    assert same(call(*inputs(2, 5.0)), total(*inputs(2, 5.0)))


def test_it_is_known_what_would_be_played(recorder: Recorder) -> None:
    graphs = Graphs(1, recorder)
    call = graphs.wrap(total, 100)
    assert not graphs.has(total, inputs(4, 1.0))
    call(*inputs(4, 1.0))
    assert graphs.has(total, inputs(4, 2.0))
    assert not graphs.has(total, inputs(5, 1.0)) and not graphs.has(same, inputs(4, 1.0))
    call(*inputs(5, 1.0))
    assert not graphs.has(total, inputs(4, 1.0)), "the least recently used goes"


def test_long_calls_are_not_recorded(recorder: Recorder) -> None:
    call = Graphs(2, recorder).wrap(total, most_tokens=4)
    assert same(call(*inputs(5, 1.0)), total(*inputs(5, 1.0)))
    assert recorder.recorded == 0


NO_RECORDING = [
    torch.OutOfMemoryError("full"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless"),
]


@pytest.mark.parametrize("failure", NO_RECORDING, ids=str)
def test_what_cannot_be_recorded_runs_as_it_is(
    recorder: Recorder, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    graphs = Graphs(2, recorder)
    call = graphs.wrap(total, most_tokens=100)
    recorder.failure = failure
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert same(call(*inputs(4, 1.0)), total(*inputs(4, 1.0)))
    assert len(caplog.records) == 1, "said once"
    assert graphs.describe() == "2 (shapes without one: 1)"
    recorder.failure = None
    call(*inputs(4, 1.0))
    assert recorder.recorded == 0, "not tried again"
    graphs.clear()
    call(*inputs(4, 1.0))
    assert recorder.recorded == 1, "until memory was given back"
    assert graphs.describe() == "2"


FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered\nframe #1: at::cuda::capture_end"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"),
    AssertionError("one layout for each shape"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_raised_and_not_taken_for_a_missing_recording(
    recorder: Recorder, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    """What was launched may fail only when it is waited for, which recording does first."""
    graphs = Graphs(2, recorder)
    call = graphs.wrap(total, most_tokens=100)
    recorder.failure = fault
    with caplog.at_level(logging.WARNING), pytest.raises(type(fault)) as caught:
        call(*inputs(4, 1.0))
    assert caught.value is fault
    assert (len(graphs), caplog.records) == (0, [])
    recorder.failure = None
    assert same(call(*inputs(4, 1.0)), total(*inputs(4, 1.0)))
    assert recorder.recorded == 1, "the shape is not given up"
