"""Rows filtered for PNG files: on a device the very bytes that they have on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fluxcore.pipeline.pictures import to_lines
from fluxcore.residues import AVERAGE, FILTERS, SUB, UP, filtered, strip_height

# (height, width): one strip and many, strips of 8 rows, a last one that is shorter than others,
# and one of which no row is looked at.
SIZES = [(16, 16), (16, 1024), (272, 48), (256, 256), (1040, 512), (512, 1040), (27, 2048)]


Content = Callable[[int, int], NDArray[np.uint8]]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(height: int, width: int) -> NDArray[np.uint8]:
    """Falling to the right and down at different rates, through the whole range and over it."""
    falls = np.add.outer(np.arange(height) * 5, np.arange(width) * 3)[..., None]
    return (falls * np.array([1, 2, -3]) % 256).astype(np.uint8)


def constant(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 200, np.uint8)


def black(height: int, width: int) -> NDArray[np.uint8]:
    """All filters leave nothing."""
    return np.zeros((height, width, 3), np.uint8)


def mixed(height: int, width: int) -> NDArray[np.uint8]:
    """Parts for each filter, one above the other."""
    part = -(-height // 3)
    columns = np.broadcast_to(noise(1, width), (part, width, 3))
    rows = np.broadcast_to(noise(part, 1), (part, width, 3))
    return np.concatenate((columns, rows, 128 + noise(part, width) // 16))[:height]


def on_the_host(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows = pixels.reshape(len(pixels), -1)
    return np.concatenate(list(filtered(rows, strip_height(*rows.shape))))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("content", [noise, gradient, constant, black, mixed])
def test_a_device_filters_as_the_host_does(content: Content, size: tuple[int, int]) -> None:
    pixels = content(*size)
    lines = to_lines(torch.from_numpy(pixels))
    assert lines.dtype == torch.uint8 and lines.is_contiguous()
    assert np.array_equal(lines.numpy(), on_the_host(pixels))


def test_each_strip_has_the_filter_that_fits() -> None:
    height, width = 768, 256
    lines = to_lines(torch.from_numpy(mixed(height, width)))
    of_strips = lines[:: strip_height(height, 3 * width), 0].tolist()
    assert set(of_strips) == set(FILTERS)
    assert (of_strips[0], of_strips[len(of_strips) // 2], of_strips[-1]) == (UP, SUB, AVERAGE)


def test_of_equals_the_first_is_taken() -> None:
    assert set(to_lines(torch.from_numpy(black(256, 256)))[:, 0].tolist()) == {SUB}


def test_the_pixels_come_back() -> None:
    """By the format's own rules, pixel by pixel. Source: PNG specification, 9.2."""
    width = 512
    pixels = mixed(96, width)
    lines = to_lines(torch.from_numpy(pixels)).numpy().astype(int)
    assert set(lines[:, 0]) == set(FILTERS)
    above = np.zeros((width, 3), int)
    for line, expected in zip(lines, pixels, strict=True):
        before, found = np.zeros(3, int), np.empty((width, 3), int)
        for column, residue in enumerate(line[1:].reshape(width, 3)):
            up = above[column]
            predicted = {SUB: before, UP: up, AVERAGE: (before + up) // 2}[line[0]]
            before = found[column] = (residue + predicted) % 256
        assert np.array_equal(found, expected)
        above = found


def test_nothing_is_waited_for() -> None:
    """What asks for a value could not be recorded. A tensor without values has none to give."""
    lines = to_lines(torch.empty((256, 256, 3), dtype=torch.uint8, device="meta"))
    assert lines.shape == (256, 769)
