"""How the C library keeps the memory that large tensors use, for a process that draws for long.

Owns nothing; without torch, so that it can be called before torch takes its first memory.

By itself glibc asks the system for every large block and gives it back when it is freed, so that
each layer's tensors come as fresh 4 KB pages, which the system clears and maps one by one at first
touch. Here freed memory stays with the process, in pages of 2 MB where the system has them.

Source: mallopt(3); the PyTorch allocator's THP_MEM_ALLOC_ENABLE.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

KEPT_BYTES = 2**31 - 1
"""Free memory at the end of the heap that is kept; what is above goes back to the system."""

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

TUNED_ELSEWHERE = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
"""Environment variables by which a user has chosen how memory is kept, or another allocator."""


def keep_freed_memory() -> bool:
    """Keep freed memory for the tensors to come; call it before the first tensor or thread is made.

    All threads share one heap, because glibc's heaps of single threads hold no large blocks.

    Returns:
        Whether it was done: not without glibc, and not where the environment says otherwise.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ for name in TUNED_ELSEWHERE):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = ctypes.CDLL(None).mallopt
    options = ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, KEPT_BYTES))
    return all(mallopt(option, value) == 1 for option, value in options)


def give_back_freed_memory() -> None:
    """Give the system what is free in the heap, wherever it lies; for when memory was short."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
