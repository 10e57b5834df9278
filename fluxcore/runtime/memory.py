"""Memory figures, and telling "out of memory" apart from other failures."""

from __future__ import annotations

import os
import re
import resource
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from fluxcore.errors import OutOfMemoryError

# CUDA's allocator raises its own class; other calls of CUDA, as that which makes a graph ready to
# be played, MPS and the CPU allocator raise other RuntimeErrors.
OUT_OF_MEMORY = re.compile(
    r"MPS backend out of memory|Invalid buffer size|INT_MAX|command buffer execution failed"
    r"|DefaultCPUAllocator: (can't|not enough)|CUDA( error:)? out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a tensor did not fit."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn a framework's out-of-memory error into ``OutOfMemoryError``.

    The original's frames are emptied on purpose: Python keeps it as the new error's
    context, and its frames hold the tensors that filled the memory.
    """
    failure = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error).splitlines()[0] if str(error) else type(error).__name__
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    if failure is not None:
        raise OutOfMemoryError(
            "the device has too little free memory for this job; ask for a smaller size, "
            f"fewer references or fewer steps in parallel ({failure})"
        )


def host_available_bytes() -> int:
    """Memory of the host that this process may still take, in bytes.

    On Linux what the kernel calls available, within the limit of the process's control
    group; on macOS, which does not say, three quarters of all.
    """
    if sys.platform != "linux":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total * 3 // 4
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return min([fields["MemAvailable"], *_control_group_bytes()])


def _control_group_bytes() -> list[int]:
    """What the control group still allows, where it has a limit; pages of files can go."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [limit - used + int(stat["inactive_file"])]
    except (OSError, ValueError, KeyError):  # no limit ("max"), or another kind of group
        return []


def host_peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes.

    On Linux ru_maxrss survives exec and so may be the parent's; where it may, VmHWM is read.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    if sys.platform == "linux" and peak <= _peak_before_exec_kib():
        peak = _own_peak_kib()
    return peak * 1024


@cache
def _peak_before_exec_kib() -> int:
    """The largest resident size of what ran in this process before; 0 if this was larger."""
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = _own_peak_kib()
    return inherited if 0 < own < inherited else 0


def _own_peak_kib() -> int:
    """VmHWM, the file of which takes 0.2 ms to read; 0 where the system does not tell it."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
