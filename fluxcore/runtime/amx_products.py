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
    *("-std=c++17", "-O3", "-fPIC", "-mfma"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
    *("-mamx-tile", "-mamx-bf16", "-mamx-int8"),
)
INSTRUCTIONS = frozenset(
    [
        "amx_tile",
        "amx_bf16",
        "amx_int8",
        "avx512_bf16",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "fma",
    ]
)
"""What the library is built of, in the words of Linux."""
COMPILER_TIMEOUT_S = 120
COLUMNS_MULTIPLE, INNER_MULTIPLE = 32, 64
"""A panel of weights, and a step in int8, of which bf16 needs half."""
PANEL = 32
"""Rows that are multiplied together."""
MOST_PANELS = 24
"""Panels of rows in a block: its slice and its sums fill two thirds of a second cache of 2 MB."""
LEAST_PANELS = 4
TASKS_A_THREAD = 4
"""Blocks become smaller until there are so many tasks, so that no thread waits long for another."""
GROUP_COLUMNS = 8 * PANEL
"""Of the weights that share what is read of the rows; ``GROUP`` there."""
GROUP_BYTES = GROUP_COLUMNS * PANEL * 4
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
        packed = weight.clone(memory_format=torch.contiguous_format)
        self.pack(packed)
        return packed

    def pack(self, weight: Tensor) -> None:
        """``packed``, in the same memory. Shapes: [N, K], contiguous."""
        threads = torch.get_num_threads()
        for columns in weight.split(GROUP_COLUMNS):  # a group's place is that of its columns
            as_rows = columns.clone()
            self._pack[weight.dtype](
                as_rows.data_ptr(), columns.data_ptr(), *columns.shape, threads
            )

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
        tokens, is_whole = k.shape[2], k.shape[1] == heads and min(heads, queries, k.shape[2]) > 0
        lie = all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q, k, v))
        if mask is not None or not lie or not is_whole or width % PANEL:
            return plain_attention(q, k, v, mask)
        _check_unlearning(q, k, v)
        out = q.new_empty(len(q), queries, heads, width).transpose(1, 2)  # [B, H, L_q, K]
        threads = min(torch.get_num_threads(), heads * -(-queries // PANEL))
        buffers = torch.empty(threads * self._attention_bytes(tokens, width), dtype=torch.uint8)
        for number in range(len(q)):
            lying = ((x[number].data_ptr(), x.stride(1), x.stride(2)) for x in (q, k, v, out))
            self._attention(
                *(argument for each in lying for argument in each),
                *(heads, queries, tokens, width, buffers.data_ptr(), threads),
            )
        return out

    def work_bytes(self, tokens: int, width: int) -> int:
        """Buffers of all threads at the most, besides the rows laid out."""
        attention: int = self._attention_bytes(tokens, width)
        return torch.get_num_threads() * max(attention, MOST_PANELS * GROUP_BYTES)

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return amx_products, ()  # copies are the same library


class AmxLinear(nn.Module):
    """A linear layer without bias on packed weights. Shapes: x [..., K] -> [..., N], bf16.

    Takes the layer's own memory. Where that is none yet (on the meta device), whoever fills it
    packs it. Packed weights mean nothing elsewhere, so that they are neither saved nor loaded.
    """

    def __init__(self, linear: nn.Linear, products: AmxProducts) -> None:
        super().__init__()
        self.products = products
        self.weight = linear.weight
        if not self.weight.is_meta:
            products.pack(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.products.linear(x, self.weight)

    def _save_to_state_dict(self, *args: object) -> None:
        raise TypeError("packed weights are not saved; load the model with kernels = plain")

    def _load_from_state_dict(self, *args: object) -> None:
        raise TypeError("weights are not loaded over packed ones; load with kernels = plain")


def pack_layer(network: nn.Module, parameter: str, products: AmxProducts) -> bool:
    """Replace the linear layer that a parameter belongs to, if it has no bias and ``fits``.

    Returns:
        Whether it was replaced.
    """
    name, _, leaf = parameter.rpartition(".")
    layer = network.get_submodule(name)
    if leaf != "weight" or not isinstance(layer, nn.Linear):
        return False
    is_taken = len(list(layer.parameters())) == 1 and fits(layer.weight)
    if is_taken:
        network.set_submodule(name, AmxLinear(layer, products))
    return is_taken


def fits(weight: Tensor) -> bool:
    """Whether it is a matrix with sides that tiles divide."""
    if weight.ndim != 2:
        return False
    columns, inner = weight.shape
    is_whole = columns % COLUMNS_MULTIPLE == 0 and inner % INNER_MULTIPLE == 0
    return is_whole and weight.numel() > 0


@functools.cache
def amx_products() -> AmxProducts | None:
    """The products, built for this process; None where there is no AMX or no compiler.

    What is missing on a processor with AMX is logged, with the remedy.
    """
    if platform.system() != "Linux" or not _instructions() >= INSTRUCTIONS:
        return None
    compiler = shutil.which("g++")
    if compiler is None:
        _warn("there is no C++ compiler; install g++ 11 or newer")
        return None
    if not torch.cpu._init_amx():  # asks the system for the tiles' registers
        _warn("the system keeps the registers of AMX to itself; use Linux 5.16 or newer")
        return None
    with tempfile.TemporaryDirectory(prefix="fluxd-") as directory:
        try:
            library = _built(compiler, Path(directory))
        except subprocess.CalledProcessError as error:
            reason = _first_error(error.stderr)
            _warn(f"{compiler} cannot build them ({reason}); install g++ 11 or newer")
            return None
        except (OSError, subprocess.TimeoutExpired) as error:
            _warn(f"{compiler} cannot build them ({error}); install g++ 11 or newer")
            return None
        try:
            # Once it is loaded, its file is no longer needed.
            return AmxProducts(ctypes.CDLL(str(library), mode=os.RTLD_NOW))
        except OSError as error:
            _warn(f"they cannot be loaded ({error}); set TMPDIR to where programs may run from")
            return None


def _instructions() -> frozenset[str]:
    """What the processor can, in Linux' words."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = next((line for line in told.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.split())


def _built(compiler: str, directory: Path) -> Path:
    """Build the library."""
    built, linked = directory / "amx.o", directory / "amx.so"
    # In two turns: only the first knows of OpenMP, so that the second brings no library of its
    # own and PyTorch's threads are used.
    for command in (
        [compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(built)],
        [compiler, "-shared", str(built), "-o", str(linked)],
    ):
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S
        )
    return linked


def _rows_of(x: Tensor) -> Tensor:
    """Shapes: [..., K] -> [M, K], with numbers of a row side by side."""
    assert x.dtype == torch.bfloat16, x.dtype
    _check_unlearning(x)
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check_unlearning(*inputs: Tensor) -> None:
    is_learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    assert not is_learning, "these products have no gradients; load with kernels = plain"


def _buffers(rows: Tensor, bytes_a_number: int, columns: int) -> tuple[int, Tensor, Tensor]:
    """Panels in a block, and memory for the rows laid out and for all threads' sums."""
    count, inner = rows.shape
    panels, threads = -(-count // PANEL), torch.get_num_threads()
    groups = -(-columns // GROUP_COLUMNS)
    blocks = -(-panels // MOST_PANELS)
    while blocks * groups < TASKS_A_THREAD * threads and -(-panels // blocks) > LEAST_PANELS:
        blocks += 1
    block = -(-panels // blocks)
    laid_out = torch.empty(panels * PANEL * inner * bytes_a_number, dtype=torch.uint8)
    return block, laid_out, torch.empty(threads * block * GROUP_BYTES, dtype=torch.uint8)


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), " ".join(lines[:1]) or "no message")


def _warn(missing: str) -> None:
    logger.warning(
        "pictures take longer than they could, without fluxd's own products: %s", missing
    )
