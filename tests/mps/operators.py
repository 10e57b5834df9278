"""Which ATen operators have a kernel for MPS, as the installed PyTorch declares it.

Source: pytorch/pytorch aten/src/ATen/native/native_functions.yaml, whose copy lies in
the wheel, under torchgen/packaged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torchgen

_FUNC = re.compile(r"- func: ([\w.]+)\(")
_DELEGATE = re.compile(r"  structured_delegate: ([\w.]+)")
_FIELD = re.compile(r"  \w+:")
_KERNEL = re.compile(r"    ([\w, ]+): [\w:]+")


@dataclass
class Operator:
    """One entry of the file.

    Attributes:
        backends: dispatch keys that have a kernel.
        delegate: the out variant whose kernels this one uses.
    """

    backends: set[str] = field(default_factory=set)
    delegate: str | None = None


@cache
def declared_operators() -> dict[str, Operator]:
    """All operators by name and overload (``add.Tensor``, ``silu``)."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found: dict[str, Operator] = {}
    operator = Operator()
    in_dispatch = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if func := _FUNC.match(line):
            operator = found[func[1]] = Operator()
        elif delegate := _DELEGATE.match(line):
            operator.delegate = delegate[1]
        elif in_dispatch and (kernel := _KERNEL.match(line)):
            operator.backends |= {key.strip() for key in kernel[1].split(",")}
        elif _FIELD.match(line):
            in_dispatch = line.startswith("  dispatch:")
    return found


@cache
def support(name: str) -> str | None:
    """How an operator runs on MPS.

    Returns:
        ``kernel``: it has one; ``composite``: it is made of other operators, before
        autograd or after it (then ``explicit``); None: it is unknown or cannot run.
    """
    operator = declared_operators().get(name)
    if operator is None:
        return None
    if "MPS" in operator.backends:
        return "kernel"
    if operator.delegate is not None and support(operator.delegate) == "kernel":
        return "kernel"
    if any(backend.startswith("CompositeExplicitAutograd") for backend in operator.backends):
        return "explicit"
    implicit = not operator.backends and operator.delegate is None
    return "composite" if implicit or "CompositeImplicitAutograd" in operator.backends else None
