"""torch.compile: whether it can be used here, where its work is kept, and how it is called.

Owns nothing of what is compiled. One compiled form serves all sizes of picture, so that
a size that was never asked for before does not wait for a compiler. There are exceptions, each of
which it compiles for once: PyTorch takes two sizes that are equal at first, such as tokens and
channels, for one; and on a CPU it convolves very small pictures in another way.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fluxcore.errors import DeviceUnavailableError

logger = logging.getLogger(__name__)

Compile = Literal["auto", "on", "off"]

MOST_FORMS = 64
"""Compiled forms of one piece of code; PyTorch's own bound of 8 counts networks together."""


def compiles(kind: str, asked: Compile) -> bool:
    """Whether to compile on a kind of device.

    ``auto`` compiles on CUDA, where it can, and says so where it cannot. On a CPU it is left to
    whoever starts a process for long, because it takes a minute the first time; on MPS it is
    not used.

    Raises:
        DeviceUnavailableError: it is ``on`` and cannot be used.
    """
    if asked == "off" or (asked == "auto" and kind != "cuda"):
        return False
    missing = _missing(kind)
    if missing is None:
        return True
    if asked == "on":
        raise DeviceUnavailableError(f"compile is on, but {missing}")
    logger.warning("networks are not compiled and so slower: %s", missing)
    return False


def keep_compiled(directory: Path) -> None:
    """Keep what is compiled in a directory, for the next start, unless the user names another."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours_alone(directory):
        logger.warning(
            "others may write to %s, and what lies there would be run: compiled networks are not "
            "kept; run chmod go-w on it, or remove it",
            directory,
        )
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)


def _is_ours_alone(directory: Path) -> bool:
    """Whether nobody else may write to a directory; always, where there are no such rights."""
    if not hasattr(os, "getuid"):
        return True
    found = directory.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def compile_block(block: nn.Module, *, sizes_vary: bool) -> None:
    """Have a module compiled as one graph at its first call; modules of one class share it.

    Args:
        sizes_vary: the compiled form serves all sizes of its arguments.
    """
    torch._dynamo.config.recompile_limit = MOST_FORMS
    block.compile(fullgraph=True, dynamic=sizes_vary)


def _missing(kind: str) -> str | None:
    """What compiling needs and is not there, with the remedy; None where nothing is missing."""
    if kind == "mps":
        return "compiling is not supported on MPS; leave it off"
    if kind == "cuda":
        missing = missing_for_triton()
        return None if missing is None else f"{missing}, or set compile to off"
    if not _found("CXX", "g++", "clang++"):
        return "there is no C++ compiler; install one, or set compile to off"
    return None


def missing_for_triton() -> str | None:
    """What kernels in Triton need and is not there, with the remedy; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; install it"
    if not _found("CC", "gcc", "cc", "clang"):
        return "there is no C compiler, which triton needs; install one"
    return None


def _found(variable: str, *names: str) -> bool:
    """Whether there is one of some programs, or the one that a variable names."""
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
