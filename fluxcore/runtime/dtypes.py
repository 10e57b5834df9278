"""Which dtype each part is kept in, per device and chip."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from fluxcore.errors import DeviceUnavailableError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    """Dtypes of one loaded model.

    Attributes:
        weights: transformer and text encoder, weights and activations.
        residual: their residual streams; None keeps the dtype of the weights.
        vae: the autoencoder.
        angles: frequencies of the position tables.
    """

    weights: torch.dtype
    residual: torch.dtype | None
    vae: torch.dtype
    angles: torch.dtype

    @property
    def name(self) -> str:
        return dtype_name(self.weights)


def choose_dtypes(kind: str, dtype: str, chip: str) -> DtypePolicy:
    """The policy for a kind of device (cpu, cuda, mps) and a dtype or ``auto``.

    float16 keeps its residual stream in float32, where klein's activations pass
    65504, and its VAE in float32 for the same reason.

    Raises:
        DeviceUnavailableError: the device cannot compute in that dtype.
    """
    if dtype == "auto":
        dtype = _best_dtype(kind, chip)
    if dtype not in DTYPES:
        raise DeviceUnavailableError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    weights = DTYPES[dtype]
    wide = weights == torch.float16
    return DtypePolicy(
        weights=weights,
        residual=torch.float32 if wide else None,
        vae=torch.float32 if wide else weights,
        angles=torch.float32 if kind == "mps" else torch.float64,
    )


def _best_dtype(kind: str, chip: str) -> str:
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if kind == "mps":
        # M1 and M2 emulate bfloat16 at half the speed of float16 (pytorch/pytorch#141864).
        return "float16" if re.search(r"\bM[12]\b", chip) else "bfloat16"
    # A build of PyTorch without oneDNN does not have the operator.
    onednn = torch.backends.mkldnn.is_available()
    native = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if native else "float32"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
