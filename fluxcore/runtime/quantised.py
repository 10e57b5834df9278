"""fp8: weights and activations of large matrix products in eight bits, with a scale a row.

Owns the number format, its rounding and the product in its plain form. Each row of
the weights has one scale, found at load; each row of the activations has one, found as
it is rounded, which the compiler fuses with whatever made the row. Knows nothing of
networks: it is told which linear layers to replace.

Source: PyTorch's torch._scaled_mm (row-wise scales); FP8 Formats for Deep Learning,
arXiv 2209.05433 (e4m3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fluxcore.errors import DeviceUnavailableError

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST_AMAX = 1e-12
"""Keeps the scale of a row of zeros above zero."""
MULTIPLE = 16
"""Sides of a matrix that the hardware takes."""

ScaledProduct = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [M, K] fp8, x_scale [M, 1], weight [N, K] fp8, weight_scale [1, N]) -> [M, N] bfloat16."""


def plain_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The reference: the same rounded values, multiplied in float32."""
    return (x.float() @ weight.float().t() * x_scale * weight_scale).bfloat16()


def hardware_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """On CUDA from capability 8.9 on."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled so that the largest value is fp8's largest, and rounded.

    Shapes: x [M, K] -> [M, K] fp8, scale [M, 1] float32; x is about the product of the two.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(SMALLEST_AMAX) / LARGEST  # [M, 1]
    return (x.float() / scale).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer without bias whose matrix is kept and multiplied in fp8.

    Shapes: x [..., K] -> [..., N] bfloat16.
    """

    def __init__(self, linear: nn.Linear, product: ScaledProduct) -> None:
        super().__init__()
        rounded, scale = round_rows(linear.weight)
        self.product = product
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.weight_scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = round_rows(x.flatten(0, -2))  # [M, K], [M, 1]
        product = self.product(rows, scale, self.weight, self.weight_scale)
        return product.view(*x.shape[:-1], -1)  # [..., N]


def quantise(blocks: Iterable[nn.Module], product: ScaledProduct) -> int:
    """Replace the linear layers of some blocks, one by one, so that memory stays low.

    They must have no bias, and those with a side that the hardware does not take stay.

    Returns:
        Bytes that the weights take less.
    """
    freed = 0
    for block in blocks:
        for owner in list(block.modules()):
            for name, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear) and _fits(layer):
                    made = Fp8Linear(layer, product)
                    freed += layer.weight.nbytes - made.weight.nbytes - made.weight_scale.nbytes
                    setattr(owner, name, made)
    return freed


def check_fp8(kind: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> None:
    """Check that a device multiplies in fp8.

    Raises:
        DeviceUnavailableError: it does not, or the rest is not in bfloat16.
    """
    if kind != "cuda" or capability is None or capability < (8, 9):
        raise DeviceUnavailableError(
            "precision fp8 needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper, "
            "Blackwell); use precision bf16"
        )
    if dtype != torch.bfloat16:
        raise DeviceUnavailableError(
            "precision fp8 goes with dtype bfloat16 or auto only; leave dtype out"
        )


def _fits(layer: nn.Linear) -> bool:
    sides = (layer.in_features, layer.out_features)
    return all(side % MULTIPLE == 0 for side in sides)
