"""Products in fp8 onto the residual stream, which leave their scales to the pass that adds them up.

Owns what such a pass is handed. Without scales the library has faster kernels; the passes are
those of ``fluxcore.runtime.triton_loop`` and ``fluxcore.runtime.triton_encoder``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fluxcore.runtime.quantised import EightBitLinear
from fluxcore.runtime.triton_kernels import gated_rows


class Addend(NamedTuple):
    """What is to be added to some rows, before its gate where there is one.

    Shapes: values [B, L, D]; scales [B L, 1] and [1, D] float32.

    Attributes:
        scales: of rows and of columns, which the values have not been multiplied by; None: they
            need no more.
    """

    values: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    def whole(self) -> Tensor:
        """With its scales."""
        if self.scales is None:
            return self.values
        of_rows, of_columns = self.scales
        scaled = self.values.flatten(0, 1) * of_rows * of_columns  # [B L, D] float32
        return scaled.to(self.values.dtype).view(self.values.shape)


def rounded_product(linear: EightBitLinear, x: Tensor) -> Addend:
    """Of rows that are rounded here. Shapes: x [B, L, K] -> [B, L, N]."""
    values, scales = linear.format.round_rows(x.flatten(0, 1))
    return _unscaled(linear, values, scales, x.shape[0])


def gated_product(linear: EightBitLinear, hidden: Tensor, before: Tensor | None = None) -> Addend:
    """As ``fluxcore.kernels.gated_linear``. Shapes: -> [B, L, N]."""
    rows = gated_rows(linear, hidden, before)
    return _unscaled(linear, rows.values.flatten(0, -2), rows.scales, hidden.shape[0])


def _unscaled(linear: EightBitLinear, values: Tensor, scales: Tensor, batch: int) -> Addend:
    """Shapes: values [B L, K] in eight bits, scales [B L, 1] -> [B, L, N]."""
    assert linear.format.unscaled is not None, "a format for GPUs"
    product = linear.format.unscaled(values, linear.weight)
    return Addend(product.unflatten(0, (batch, -1)), (scales, linear.weight_scale))
