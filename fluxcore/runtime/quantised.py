"""Eight bits: weights and activations of large matrix products as fp8 or int8, with a scale a row.

Owns the number formats, their rounding and their products, each beside its plain form. Each row
of the weights has one scale, found at load; each row of the activations has one, found as it is
rounded. Knows nothing of networks: it is told which linear layers to replace.

Source: PyTorch's torch._scaled_mm (row-wise scales) and onednn::qlinear_pointwise; FP8 Formats for
Deep Learning, arXiv 2209.05433 (e4m3); LLM.int8(), arXiv 2208.07339 (scales of rows).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fluxcore.errors import DeviceUnavailableError

Precision = Literal["bf16", "fp8", "int8"]

SMALLEST_AMAX = 1e-12
"""Keeps the scale of a row of zeros above zero."""
MULTIPLE = 16
"""Sides of a matrix that the hardware takes."""
ROWS_AT_ONCE = 1024
"""Rows of a matrix that are rounded at once, so that their wider forms stay small."""

ScaledProduct = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""(x [M, K], x_scale [M, 1], weight [N, K] as packed, weight_scale [1, N], dtype) -> [M, N]."""


@dataclass(frozen=True, slots=True)
class EightBits:
    """A number format and how it is multiplied.

    Attributes:
        largest: what the largest value of each row is scaled to.
        product: of rounded rows and packed weights.
        pack: brings rounded weights into the form that ``product`` takes; done once.
        rounding: (x, dtype, largest, smallest) -> as ``round_rows``, in one kernel; None: plain.
        linear: (x, weight as packed, its scales [N]) -> rounded and multiplied in one; or None.
        unscaled: (x [M, K], weight as packed) -> [M, N] bfloat16, of rounded values alone; or None.
    """

    dtype: torch.dtype
    largest: float
    product: ScaledProduct
    pack: Callable[[Tensor], Tensor] = lambda weight: weight
    rounding: Callable[..., tuple[Tensor, Tensor]] | None = None
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    unscaled: Callable[[Tensor, Tensor], Tensor] | None = None

    def round_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows scaled to the format's range, and rounded.

        Shapes: x [M, K] -> [M, K], scale [M, 1] float32; x is about the product of the two.
        """
        if self.rounding is not None:
            return self.rounding(x, self.dtype, self.largest, SMALLEST_AMAX)
        amax = x.abs().amax(dim=-1, keepdim=True).float()
        scale = amax.clamp_min(SMALLEST_AMAX) / self.largest  # [M, 1]
        scaled = x / scale  # [M, K] float32
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype), scale


def plain_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The reference: the same rounded values, multiplied in float32."""
    return (x.float() @ weight.float().t() * x_scale * weight_scale).to(dtype)


def cuda_fp8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """On CUDA from capability 8.9 on."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        out_dtype=dtype,
        use_fast_accum=True,
    )


def plain_unscaled(x: Tensor, weight: Tensor) -> Tensor:
    """The reference: the rounded values, multiplied in float32."""
    return (x.float() @ weight.float().t()).to(torch.bfloat16)


def cuda_fp8_unscaled(x: Tensor, weight: Tensor) -> Tensor:
    """On CUDA. cuBLAS has most of its kernels only for products whose scale is one number: on an
    H200 1536x3072x12288 takes 79 us, and 105 with scales of rows.
    """
    one = _one(x.device)
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def give_no_workspace() -> None:
    """Leave cuBLASLt no memory but its operands', in this process.

    Where it has some, units take tiles as they become free, and the counter for that is cleared
    before each large product. On an H200 that and the gaps around it take 4 us, and a product of
    4608x27648x3072 takes 548 us with it and 518 without. Has an effect before the first such
    product of a process, and where nobody set it otherwise.
    """
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "0")


def cpu_int8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """On CPUs with VNNI or AMX, whose instructions want one factor without a sign."""
    unsigned = x.view(torch.uint8) ^ 128  # x + 128
    no_shift = torch.zeros(weight_scale.shape[1], dtype=torch.int32)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned,
        1.0,
        128,
        weight,
        weight_scale.flatten(),
        no_shift,
        None,  # bias
        1.0,
        0,
        dtype,
        "none",
        [],
        "",
    )
    return product.mul_(x_scale)


def packed_int8(weight: Tensor) -> Tensor:
    """In the layout that oneDNN multiplies in, which depends on the processor."""
    return torch.ops.onednn.qlinear_prepack(weight, None)  # type: ignore[no-any-return]


FP8 = EightBits(
    torch.float8_e4m3fn,
    float(torch.finfo(torch.float8_e4m3fn).max),
    cuda_fp8_product,
    unscaled=cuda_fp8_unscaled,
)
PLAIN_FP8 = EightBits(FP8.dtype, FP8.largest, plain_product, unscaled=plain_unscaled)
INT8 = EightBits(torch.int8, 127.0, cpu_int8_product, packed_int8)
PLAIN_INT8 = EightBits(INT8.dtype, INT8.largest, plain_product)

FORMATS: dict[Precision, EightBits] = {"fp8": FP8, "int8": INT8}


class EightBitLinear(nn.Module):
    """A linear layer without bias whose matrix is kept and multiplied in eight bits.

    Shapes: x [..., K] -> [..., N], in x's dtype.
    """

    def __init__(self, linear: nn.Linear, format: EightBits) -> None:
        super().__init__()
        pieces = [format.round_rows(rows) for rows in linear.weight.split(ROWS_AT_ONCE)]
        rounded, scale = (torch.cat(part) for part in zip(*pieces, strict=True))
        self.format = format
        self.weight = nn.Parameter(format.pack(rounded), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.format.linear is not None:
            return self.format.linear(x, self.weight, self.weight_scale.flatten())
        rows, scale = self.format.round_rows(x.flatten(0, -2))  # [M, K], [M, 1]
        return self.multiply(rows, scale, x.dtype).view(*x.shape[:-1], -1)  # [..., N]

    def multiply(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows that are rounded already. Shapes: rows [M, K], scale [M, 1] -> [M, N]."""
        return self.format.product(rows, scale, self.weight, self.weight_scale, dtype)


def quantise(blocks: Iterable[nn.Module], format: EightBits) -> int:
    """Replace all linear layers of some blocks that can be; bytes that they take less."""
    names = [(block, name) for block in blocks for name, _ in list(block.named_parameters())]
    return sum(quantise_layer(block, name, format) for block, name in names)


def quantise_layer(network: nn.Module, parameter: str, format: EightBits) -> int:
    """Replace the linear layer that a parameter belongs to, if it is one that can be.

    It must have no bias. One with a side that the hardware does not take stays.

    Returns:
        Bytes that it takes less.
    """
    name, _, leaf = parameter.rpartition(".")
    layer = network.get_submodule(name)
    if leaf != "weight" or not isinstance(layer, nn.Linear) or not _fits(layer):
        return 0
    made = EightBitLinear(layer, format)
    network.set_submodule(name, made)
    return layer.weight.nbytes - made.weight.nbytes - made.weight_scale.nbytes


def check_precision(
    precision: Precision, kind: str, dtype: torch.dtype, capability: tuple[int, int] | None
) -> None:
    """Check that a device multiplies in a precision.

    Args:
        dtype: of the weights and of what is not multiplied in that precision.
        capability: of a CUDA GPU.

    Raises:
        DeviceUnavailableError: it does not.
    """
    if precision == "fp8":
        if kind != "cuda" or capability is None or capability < (8, 9):
            raise DeviceUnavailableError(
                "precision fp8 needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper, "
                "Blackwell); use precision bf16"
            )
        if dtype != torch.bfloat16:
            raise DeviceUnavailableError(
                "precision fp8 goes with dtype bfloat16 or auto only; leave dtype out"
            )
    if precision == "int8":
        if kind != "cpu" or not torch.cpu._is_vnni_supported():
            raise DeviceUnavailableError(
                "precision int8 needs device cpu and a processor with VNNI (x86-64 of about 2019 "
                "and later); use precision bf16"
            )
        if dtype == torch.float16:
            raise DeviceUnavailableError(
                "precision int8 does not go with dtype float16; leave dtype out"
            )


def _fits(layer: nn.Linear) -> bool:
    sides = (layer.in_features, layer.out_features)
    return all(side % MULTIPLE == 0 for side in sides)
