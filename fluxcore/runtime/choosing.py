"""Which device there is, and how networks run on it: from settings to a ``Runtime``.

Owns what is refused, and what is taken where nothing was said. What a device then does differently
is the ``Runtime``'s.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
from typing import Literal

import torch

from fluxcore.errors import DeviceUnavailableError
from fluxcore.runtime.amx_products import amx_products
from fluxcore.runtime.compiling import Compile, compiles, missing_for_triton
from fluxcore.runtime.device import Runtime
from fluxcore.runtime.dtypes import choose_dtypes
from fluxcore.runtime.graphs import CudaRecorder, Graphs
from fluxcore.runtime.quantised import Precision, check_precision, give_no_workspace

KernelChoice = Literal["auto", "plain", "fused"]

logger = logging.getLogger(__name__)

KINDS = ("mps", "cuda", "cpu")


def choose_runtime(
    device: str = "auto",
    dtype: str = "auto",
    *,
    precision: Precision = "bf16",
    kernels: KernelChoice = "auto",
    compile_networks: Compile = "off",
    cuda_graphs: int = 0,
) -> Runtime:
    """Pick a device, its dtypes, and how networks run on it.

    Args:
        device: ``auto`` (the first there is of mps, cuda, cpu), ``mps``, ``cuda``,
            ``cuda:N`` or ``cpu``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        precision: ``bf16``, which multiplies in dtype, ``fp8`` or ``int8``.
        kernels: ``plain``; ``auto``, which takes fluxd's own where there are some, on CUDA and on
            CPUs with AMX; or ``fused``, which insists on them.
        compile_networks: ``auto``, ``on`` or ``off``.
        cuda_graphs: recordings that are kept at most; has no effect but on CUDA.

    Raises:
        DeviceUnavailableError: it is not there, not in that dtype or precision, cannot
            compile, or has no kernels of fluxd's own where these are asked for.
    """
    if device == "auto":
        device = next(kind for kind in KINDS if _available(kind))
    if not re.fullmatch(r"mps|cpu|cuda(:[0-9]{1,3})?", device):
        raise DeviceUnavailableError(
            f"device must be auto, mps, cuda, cuda:N or cpu; got {device!r}"
        )
    kind, _, index = device.partition(":")
    if not _available(kind):
        raise DeviceUnavailableError(
            f"device {kind} is not available to this PyTorch ({torch.__version__}); "
            f"available: {', '.join(k for k in KINDS if _available(k))}"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(
            f"device {device} does not exist; this machine has {torch.cuda.device_count()}"
        )
    chip = chip_name(kind, int(index or 0))
    dtypes = choose_dtypes(kind, dtype, chip)
    place = torch.device(device)
    capability = torch.cuda.get_device_capability(place) if kind == "cuda" else None
    check_precision(precision, kind, dtypes.weights, capability)
    if precision == "fp8":
        give_no_workspace()
    fuses = kind == "cuda" and kernels != "plain"
    missing = missing_for_triton() if fuses else None
    if missing is not None:
        logger.warning("pictures take longer than they could: %s", missing)
    if precision == "int8" and compile_networks == "on":
        raise DeviceUnavailableError("networks in int8 are not compiled; set compile to off")
    compiling = compiles(kind, compile_networks)
    packs = kind == "cpu" and dtypes.weights == torch.bfloat16 and kernels != "plain"
    runtime = Runtime(
        device=place,
        kind=kind,
        dtypes=dtypes,
        chip=chip,
        capability=capability,
        precision=precision,
        fuses=fuses,
        amx=amx_products() if packs and not compiling else None,
        compiles=compiling,
        graphs=Graphs(cuda_graphs, CudaRecorder(place)) if kind == "cuda" and cuda_graphs else None,
    )
    if kernels == "fused" and runtime.kernels_told == "plain":
        raise DeviceUnavailableError(
            f"there are no kernels of fluxd's own for device {device} with dtype {dtype}; they are "
            "for CUDA in 16 bits, and for CPUs with AMX and g++ in bfloat16, not compiled; set "
            "kernels to auto"
        )
    return runtime


def _available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind == "cpu" or torch.cuda.is_available()


def chip_name(kind: str, index: int) -> str:
    """The GPU's or the processor's own name."""
    if kind == "cuda":
        return torch.cuda.get_device_name(index)
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        return found.stdout.strip() or platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
