"""Choosing a device, and everything that is done differently on it."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass

import torch

from fluxcore.errors import DeviceUnavailableError
from fluxcore.kernels import Kernels, plain_attention
from fluxcore.runtime.attention import chunked_attention, contiguous_attention
from fluxcore.runtime.dtypes import DtypePolicy, choose_dtypes, dtype_name
from fluxcore.runtime.memory import host_available_bytes, host_peak_bytes
from fluxcore.runtime.residency import Residency

KINDS = ("mps", "cuda", "cpu")


@dataclass(frozen=True, slots=True)
class Runtime:
    """One device, its dtypes and its rules.

    Attributes:
        device: where tensors live.
        kind: whose rules apply (mps, cuda or cpu). Differs from ``device`` only in
            audits, which run the MPS rules on another device.
        dtypes: which dtype each part has.
        chip: the processor's name as the system gives it.
        residency: how much of the model stays on the device.
    """

    device: torch.device
    kind: str
    dtypes: DtypePolicy
    chip: str
    residency: Residency = "resident"

    def kernels(self) -> Kernels:
        """The functions that the networks are built with."""
        mps = self.kind == "mps"
        return Kernels(
            attention=contiguous_attention if mps else plain_attention,
            vae_attention=chunked_attention if mps else plain_attention,
            residual_dtype=self.dtypes.residual,
        )

    @property
    def channels_last(self) -> bool:
        """Whether convolutions run on channels-last weights and pictures."""
        return self.kind != "mps"

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def reset_peak(self) -> None:
        """Start measuring ``peak_bytes`` anew, where the device can."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Peak device memory in bytes: since ``reset_peak`` on CUDA, what Metal holds now on
        MPS, and the process's largest resident size on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return host_peak_bytes()

    def available_bytes(self) -> int:
        """Memory that a model may be loaded into, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        if self.device.type == "mps":
            within = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
            return min(within, host_available_bytes())
        return host_available_bytes()

    def memory_bytes(self) -> dict[str, int]:
        """Memory in use by place; may be called from any thread, and waits for nothing."""
        places = {"host_peak": host_peak_bytes()}
        if self.device.type == "cuda":
            places["device_allocated"] = torch.cuda.memory_allocated(self.device)
            places["device_reserved"] = torch.cuda.memory_reserved(self.device)
        elif self.device.type == "mps":
            places["device_allocated"] = torch.mps.current_allocated_memory()
            places["device_reserved"] = torch.mps.driver_allocated_memory()
        return places

    def release_memory(self) -> None:
        """Give back what a failed job left behind. Call it outside any except block."""
        gc.collect()
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def describe(self) -> dict[str, str]:
        """What to log at start and to put into a bug report."""
        residual = self.dtypes.residual or self.dtypes.weights
        return {
            "device": str(self.device),
            "chip": self.chip,
            "dtype": self.dtypes.name,
            "residual_dtype": dtype_name(residual),
            "vae_dtype": dtype_name(self.dtypes.vae),
            "residency": self.residency,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": _system(),
            "threads": str(torch.get_num_threads()),
        }


def choose_runtime(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Pick a device and its dtypes.

    Args:
        device: ``auto`` (the first there is of mps, cuda, cpu), ``mps``, ``cuda``,
            ``cuda:N`` or ``cpu``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        DeviceUnavailableError: it is not there, or not in that dtype.
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
    return Runtime(
        device=torch.device(device),
        kind=kind,
        dtypes=choose_dtypes(kind, dtype, chip),
        chip=chip,
    )


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


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"
