"""Matrix products and attention of our own on CPUs with AMX, beside PyTorch's.

Owns the building and loading of ``amx_products.cpp``, the packing of weights into its layout, and
the layers that are multiplied by it: in bf16, and in int8 with a scale a row, where rows are
rounded on their way into the tiles. The plain forms are ``F.linear``,
``quantised.plain_product`` and ``kernels.plain_attention``.

A sum depends on its row and its column alone, in one order, so that the rows that share a product
change no bit of each other.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxcore.kernels import plain_attention

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-mfma"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
    *("-mamx-tile", "-mamx-bf16", "-mamx-int8"),
)
COMPILER_TIMEOUT_S = 120
COLUMNS_MULTIPLE, INNER_MULTIPLE = 32, 64
PANEL = 32
"""Rows that are multiplied together."""
MOST_PANELS = 24
"""Panels of rows in a block: its slice and its sums fill two thirds of a second cache of 2 MB."""
LEAST_PANELS = 4
TASKS_A_THREAD = 4
"""Blocks become smaller until there are so many tasks, so that no thread waits long for another."""
GROUP_BYTES = 8 * PANEL * PANEL * 4
"""Sums of one panel of rows and a group of panels of weights."""


class AmxProducts:
    """The loaded library.

    Args:
        library: built from ``SOURCE``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        self._pack = {
            torch.bfloat16: library.fluxd_pack_bf16,
            torch.int8: library.fluxd_pack_int8,
        }
        for function in self._pack.values():
            function.argtypes = (pointer, pointer, number, number, ctypes.c_int)
            function.restype = None
        self._bf16, self._int8 = library.fluxd_product_bf16, library.fluxd_product_int8
        sizes = (number, number, number, number)
        self._bf16.argtypes = (
            *(pointer, number, pointer, pointer, *sizes),
            *(pointer, pointer, ctypes.c_int),
        )
        self._int8.argtypes = (
            *(pointer, number, pointer, pointer, pointer, *sizes),
            *(pointer, pointer, pointer, ctypes.c_int),
        )
        self._bf16.restype = self._int8.restype = None
        self._attention, self._attention_bytes = (
            library.fluxd_attention,
            library.fluxd_attention_bytes,
        )
        lying = (pointer, number, number)
        self._attention.argtypes = (
            *(*lying, *lying, *lying, *lying),
            *(*sizes, pointer, ctypes.c_int),
        )
        self._attention.restype = None
        self._attention_bytes.argtypes, self._attention_bytes.restype = (number, number), number

    def packed(self, weight: Tensor) -> Tensor:
        """Weights in the order in which they are multiplied.

        Shapes: [N, K] bf16 or int8, which ``fits`` -> [N, K], to be read by the products alone.
        """
        weight = weight.contiguous()
        packed = torch.empty_like(weight)
        columns, inner = weight.shape
        self._pack[weight.dtype](
            weight.data_ptr(), packed.data_ptr(), columns, inner, torch.get_num_threads()
        )
        return packed

    def linear(self, x: Tensor, packed: Tensor) -> Tensor:
        """``F.linear`` in bf16. Shapes: x [..., K], packed [N, K] -> [..., N]."""
        rows = _rows_of(x)  # [M, K]
        assert packed.shape[1] == rows.shape[1], (packed.shape, rows.shape)
        out = rows.new_empty(len(rows), len(packed))  # [M, N]
        if len(rows):
            block, laid_out, sums = _buffers(rows, 2, len(packed))
            self._bf16(
                *(rows.data_ptr(), rows.stride(0), packed.data_ptr(), out.data_ptr()),
                *(*rows.shape, len(packed), block),
                *(laid_out.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
            )
        return out.view(*x.shape[:-1], len(packed))

    def int8_linear(self, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        """Of rows in bf16, each rounded to int8 by its largest.

        Shapes: x [..., K], packed [N, K] int8, scales [N] float32 -> [..., N].
        """
        rows = _rows_of(x)  # [M, K]
        assert packed.shape[1] == rows.shape[1], (packed.shape, rows.shape)
        out = rows.new_empty(len(rows), len(packed))  # [M, N]
        if len(rows):
            block, laid_out, sums = _buffers(rows, 1, len(packed))
            of_rows = torch.empty(len(rows), dtype=torch.float32)
            self._int8(
                *(rows.data_ptr(), rows.stride(0), packed.data_ptr(), scales.data_ptr()),
                *(out.data_ptr(), *rows.shape, len(packed), block, laid_out.data_ptr()),
                *(of_rows.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
            )
        return out.view(*x.shape[:-1], len(packed))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As ``kernels.plain_attention``, which is used for masks and grouped heads.

        Shapes: q [B, H, L_q, K], k and v [B, H, L, K] -> [B, H, L_q, K], lying as [B, L_q, H, K].
        """
        heads, queries, width = q.shape[1:]
        tokens, is_whole = k.shape[2], k.shape[1] == heads and queries > 0
        lie = all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q, k, v))
        if mask is not None or not lie or not is_whole or width % PANEL:
            return plain_attention(q, k, v, mask)
        out = q.new_empty(len(q), queries, heads, width).transpose(1, 2)  # [B, H, L_q, K]
        threads = torch.get_num_threads()
        buffers = torch.empty(threads * self._attention_bytes(tokens, width), dtype=torch.uint8)
        for number in range(len(q)):
            lying = ((x[number].data_ptr(), x.stride(1), x.stride(2)) for x in (q, k, v, out))
            self._attention(
                *(argument for each in lying for argument in each),
                *(heads, queries, tokens, width, buffers.data_ptr(), threads),
            )
        return out


class AmxLinear(nn.Module):
    """A linear layer without bias on packed weights. Shapes: x [..., K] -> [..., N], bf16."""

    def __init__(self, linear: nn.Linear, products: AmxProducts) -> None:
        super().__init__()
        self.products = products
        self.weight = nn.Parameter(products.packed(linear.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.products.linear(x, self.weight)


def pack_layer(network: nn.Module, parameter: str, products: AmxProducts) -> None:
    """Replace the linear layer that a parameter belongs to, if it has no bias and ``fits``."""
    name, _, leaf = parameter.rpartition(".")
    layer = network.get_submodule(name)
    if leaf != "weight" or not isinstance(layer, nn.Linear):
        return
    if len(list(layer.parameters())) == 1 and fits(layer.weight):
        network.set_submodule(name, AmxLinear(layer, products))


def fits(weight: Tensor) -> bool:
    """Whether it is a matrix with sides that tiles divide."""
    if weight.ndim != 2:
        return False
    columns, inner = weight.shape
    return columns % COLUMNS_MULTIPLE == 0 and inner % INNER_MULTIPLE == 0


@functools.cache
def amx_products() -> AmxProducts | None:
    """The products, built for this process; None where there is no AMX or no compiler.

    What is missing on a processor with AMX is logged, with the remedy.
    """
    if platform.system() != "Linux" or not torch.cpu._is_amx_tile_supported():
        return None
    compiler = next(filter(shutil.which, (os.environ.get("CXX") or "g++", "g++")), None)
    if compiler is None:
        _warn("there is no C++ compiler; install g++ 11 or newer")
        return None
    try:
        # Asks the system for the tiles' registers.
        if not torch.cpu._init_amx():
            return None
        return AmxProducts(_built(compiler))
    except subprocess.CalledProcessError as error:
        _warn(
            f"{compiler} could not build them ({_first_error(error.stderr)}); use g++ 11 or newer"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(f"{compiler} could not build them ({error})")
    return None


def _built(compiler: str) -> ctypes.CDLL:
    """Build the library and load it; once loaded, its file is no longer needed."""
    with tempfile.TemporaryDirectory(prefix="fluxd-") as directory:
        built, linked = Path(directory, "amx.o"), Path(directory, "amx.so")
        # In two turns: only the first knows of OpenMP, so that the second brings no library of its
        # own and PyTorch's threads are used.
        for command in (
            [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(built)],
            [compiler, "-shared", str(built), "-o", str(linked)],
        ):
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S
            )
        return ctypes.CDLL(str(linked), mode=os.RTLD_NOW)


def _rows_of(x: Tensor) -> Tensor:
    """Shapes: [..., K] -> [M, K], with numbers of a row side by side."""
    assert x.dtype == torch.bfloat16, x.dtype
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _buffers(rows: Tensor, bytes_a_number: int, columns: int) -> tuple[int, Tensor, Tensor]:
    """Panels in a block, and memory for the rows laid out and for all threads' sums."""
    count, inner = rows.shape
    panels, threads = -(-count // PANEL), torch.get_num_threads()
    groups = -(-columns // (8 * PANEL))
    blocks = -(-panels // MOST_PANELS)
    while blocks * groups < TASKS_A_THREAD * threads and -(-panels // blocks) > LEAST_PANELS:
        blocks += 1
    block = -(-panels // blocks)
    laid_out = torch.empty(panels * PANEL * inner * bytes_a_number, dtype=torch.uint8)
    # Sums are asked for one tile ahead, rows two steps: both may be read past their end, by lines
    # that are only fetched.
    return block, laid_out, torch.empty(threads * block * GROUP_BYTES, dtype=torch.uint8)


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), " ".join(lines[:1]) or "no message")


def _warn(missing: str) -> None:
    logger.warning(
        "pictures take longer than they could, without fluxd's own products: %s", missing
    )
