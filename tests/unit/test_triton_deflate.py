"""Rows compressed by the GPU's kernels, against zlib: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fluxcore.residues import adler_of
from tests.unit.interpreted import interpreter_that_knows_bfloat16

pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a CUDA GPU nor TRITON_INTERPRET=1", allow_module_level=True)
from fluxcore.runtime import triton_deflate  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter looks at shifted values as if they were one number.
pytestmark = pytest.mark.filterwarnings("ignore:Value ")
RANDOM = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if ON_GPU:
        yield
    else:
        yield from interpreter_that_knows_bfloat16(monkeypatch)


def compressed(lines: np.ndarray, strip_rows: int) -> tuple[bytes, tuple[int, int, int]]:
    """The whole stream's memory, and what was told."""
    stream, told = triton_deflate.deflate_lines(torch.from_numpy(lines).to(DEVICE), strip_rows)
    bits, total, weighted = told.tolist()
    return stream.cpu().numpy().tobytes(), (bits, total, weighted)


def bell(rows: int, columns: int, spread: float) -> np.ndarray:
    """As a filter leaves a photograph: small values of both signs."""
    return RANDOM.normal(0, spread, (rows, columns)).round().astype(np.int64).astype(np.uint8)


def halving(rows: int, columns: int) -> np.ndarray:
    """Each value half as frequent as the one before, so that codes want to be very long."""
    steps = RANDOM.geometric(0.5, (rows, columns))
    values = np.minimum(steps, 40).astype(np.uint8)
    values[0, :40] = np.arange(40)
    return values


LINES = {
    "bell": bell(40, 97, 6),
    "narrow bell": bell(33, 193, 1),
    "uniform": RANDOM.integers(0, 256, (24, 145)).astype(np.uint8),
    "one value": np.full((16, 49), 255, np.uint8),
    "two values": RANDOM.integers(0, 2, (16, 49)).astype(np.uint8),
    "halving": halving(64, 300),
    "one byte": np.full((1, 1), 7, np.uint8),
    "several parts": bell(9, 3 * triton_deflate.PART // 4 + 1, 9),
    "strips that differ": np.concatenate((bell(8, 97, 1), bell(8, 97, 60), bell(3, 97, 4))),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("strip_rows", [8, 16, 1000])
def test_zlib_reads_them(name: str, strip_rows: int) -> None:
    lines = LINES[name]
    stream, (bits, total, weighted) = compressed(lines, strip_rows)
    assert 8 * len(stream) >= bits
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    assert reader.decompress(stream[: -(-bits // 8)]) == lines.tobytes()
    assert reader.eof and not reader.unused_data
    assert adler_of(lines.size, total, weighted) == zlib.adler32(lines.tobytes())


@pytest.mark.parametrize(("spread", "more"), [(1.7, 0.025), (1.5, 0.01), (6, 0.01), (60, 0.01)])
def test_they_take_hardly_more_than_huffman_s_codes(spread: float, more: float) -> None:
    lines = bell(64, 500, spread)
    _, (bits, _, _) = compressed(lines, len(lines))
    reference = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    least = len(reference.compress(lines.tobytes()) + reference.flush())
    # Beside 140 bytes that tell the codes, where zlib needs fewer.
    assert bits / 8 < (1 + more) * least + 140


def test_what_does_not_fit_is_told_and_writes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_deflate, "LEAST_SPARE", 0)
    lines = RANDOM.integers(0, 256, (8, 64)).astype(np.uint8)
    stream, (bits, _, _) = compressed(lines, 8)
    assert bits > 8 * len(stream), "all values are equally frequent, and their codes come on top"


@pytest.mark.parametrize("missing", [0, 1, 32, 33])
def test_all_is_there_where_it_is_told_to_fit(
    monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    lines = RANDOM.integers(0, 256, (8, 64)).astype(np.uint8)
    _, (bits, _, _) = compressed(lines, 8)
    words = -(-(bits - missing) // 32)
    monkeypatch.setattr(triton_deflate, "LEAST_SPARE", 4 * words - lines.size)
    stream, (again, _, _) = compressed(lines, 8)
    assert again == bits and len(stream) == 4 * words
    fits = bits <= 8 * len(stream)
    assert fits or missing
    if fits:
        raw = stream[: -(-bits // 8)]
        assert zlib.decompress(raw, -zlib.MAX_WBITS) == lines.tobytes()


def test_rows_may_lie_apart() -> None:
    whole = torch.from_numpy(bell(32, 90, 5)).to(DEVICE)
    part = whole[::2, :60]
    stream, told = triton_deflate.deflate_lines(part, 8)
    raw = stream.cpu().numpy().tobytes()[: -(-int(told[0]) // 8)]
    assert zlib.decompress(raw, -zlib.MAX_WBITS) == part.cpu().numpy().tobytes()
