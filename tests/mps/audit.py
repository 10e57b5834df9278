"""The rules of the MPS device, checked on every operator that would run on it.

Owns what counts as a violation and the record of what ran. A run under ``Audit`` goes on
after a violation, so that one run shows them all. Host work (noise, position tables,
pictures) touches no tensor of the device and is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.mps.operators import support
from tests.mps.pretend import PretendDevice, PretendTensor, flat

LARGEST_ELEMENTS = 2**31

LARGEST_BYTES = 2**32
"""Above it MPSNDArray aborts the process. Source: pytorch/pytorch#149325."""

LARGEST_SCORES = 2**30

LARGEST_ROWS = 2048
"""Queries at a time where the scores are written out."""

FUSED_HEAD_WIDTHS = (64, 128)
"""Attention with these writes no scores. Source: pytorch/pytorch
aten/src/ATen/native/mps/operations/Attention.mm."""

FORBIDDEN_DTYPES = frozenset(
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and (dtype == torch.float64 or dtype.is_complex or str(dtype).startswith("torch.float8"))
)

CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)

ATTENTION = "scaled_dot_product_attention"

# What these become is decided by #ifdef in a build for macOS, or lies behind a kernel that
# resizes its result: taking them apart in another build would not show it.
BECOMES = {
    ATTENTION: "_scaled_dot_product_attention_math_for_mps",
    "convolution": "_mps_convolution",
    "arange": "arange.start_out",
    "arange.start": "arange.start_out",
    "arange.start_step": "arange.start_out",
}

ALLOCATIONS = frozenset({"empty.memory_format", "empty_strided"})
SCALED_SUMS = frozenset({"addmm", "baddbmm", "addbmm", "addmv", "addr"})


class Violation(NamedTuple):
    rule: str
    operator: str
    stage: str
    detail: str


class Ran(NamedTuple):
    """One operator on the device.

    Attributes:
        kind: ``kernel``; ``view`` and ``allocation``, which start no kernel; ``upload``,
            ``download`` and ``wait``, at which the host waits until the device is done.
        operands: shapes and dtypes of its tensors.
    """

    operator: str
    stage: str
    kind: str
    operands: tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One operator with its arguments, as the rules look at it.

    Attributes:
        name: without its namespace.
        leaves: all arguments, those in lists one by one.
        tensors: the leaves that are tensors, of device and host.
    """

    name: str
    func: Any
    args: Any
    kwargs: Any
    leaves: list[Any]
    tensors: list[Tensor]


class Audit(PretendDevice):
    """A pretended device that judges what runs on it.

    Attributes:
        violations: every breach of a rule, in order.
        ran: every operator that would run on the device, composites taken apart.
    """

    def __init__(self, storage: str = "cpu") -> None:
        super().__init__(storage)
        self.violations: list[Violation] = []
        self.ran: list[Ran] = []
        self._named_violations = 0
        self._named_ran = 0

    def finish(self, stage: str) -> list[Ran]:
        """Name the stage of all that happened since the last call; returns what ran."""
        for i in range(self._named_violations, len(self.violations)):
            self.violations[i] = self.violations[i]._replace(stage=stage)
        start, self._named_ran = self._named_ran, len(self.ran)
        self._named_violations = len(self.violations)
        self.ran[start:] = [ran._replace(stage=stage) for ran in self.ran[start:]]
        return self.ran[start:]

    def named(self, stage: str) -> list[Ran]:
        """Everything that ran in a stage."""
        return [ran for ran in self.ran if ran.stage == stage]

    def check(self) -> None:
        """Fail on violations, naming each kind once."""
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for rule, operator, stage, detail in self.violations:
            kinds.setdefault((rule, operator, stage), []).append(detail)
        lines = [
            f"{rule}: {operator} in {stage or 'the run'}, {len(details)} times: {details[0]}"
            for (rule, operator, stage), details in kinds.items()
        ]
        assert not lines, "not fit for MPS:\n" + "\n".join(lines)

    def kernel(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.name().removeprefix("aten::")
        becomes = BECOMES.get(name, name)
        how = support(becomes)
        if how == "composite" and name not in BECOMES:
            return self.decompose(func, "CompositeImplicitAutograd", args, kwargs)
        # copy_ is told apart by its devices, the others start no kernel
        if how == "explicit" and not (name in ("copy_", "_unsafe_view") or _is_view(func)):
            return self.decompose(func, "CompositeExplicitAutograd", args, kwargs)
        leaves = flat((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, Tensor)]
        call = Call(name, func, args, kwargs, leaves, tensors)
        if how is None:
            self._violate("no kernel", call, f"{becomes} has none for MPS")
        operands = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        self.ran.append(Ran(becomes, "", _kind(call), operands))
        for rule, breaches in RULES.items():
            for detail in breaches(call):
                self._violate(rule, call, detail)
        out = self.compute(func, args, kwargs)
        for result in flat([out]):
            if isinstance(result, PretendTensor):
                for detail in _oversized(result):
                    self._violate("size", call, f"the result, {detail}")
        # MPS writes the result contiguous, whatever the host's kernel does
        return PretendTensor(out.storage_tensor.contiguous()) if name == ATTENTION else out

    def _violate(self, rule: str, call: Call, detail: str) -> None:
        self.violations.append(Violation(rule, call.name, "", detail))


def _dtypes(call: Call) -> Iterator[str]:
    """No float64, complex or fp8, be it a tensor or an argument."""
    for value in call.leaves:
        dtype = value.dtype if isinstance(value, Tensor) else value
        if isinstance(dtype, torch.dtype) and dtype in FORBIDDEN_DTYPES:
            yield _shown(value) if isinstance(value, Tensor) else f"dtype {dtype}"


def _sizes(call: Call) -> Iterator[str]:
    for tensor in call.tensors:
        yield from _oversized(tensor)


def _oversized(tensor: Tensor) -> Iterator[str]:
    # an expanded view takes no memory, but its elements are indexed all the same
    if tensor.numel() > LARGEST_ELEMENTS:
        yield f"{_shown(tensor)} has more than 2^31 elements"
    elif tensor.numel() * tensor.element_size() > LARGEST_BYTES:
        yield f"{_shown(tensor)} takes more than 2^32 bytes"


def _attention(call: Call) -> Iterator[str]:
    """Contiguous q, k and v of one dtype; scores that are written out stay small."""
    if call.name != ATTENTION:
        return
    q, k, v = call.args[:3]
    mask = call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 or not tensor.is_contiguous():
            yield f"{name} {_shown(tensor)} has strides {tensor.stride()}"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        yield f"q, k and v of {q.dtype}, {k.dtype} and {v.dtype}"
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        yield f"a mask of {mask.dtype} for q of {q.dtype}"
    if q.shape[-1] == v.shape[-1] and q.shape[-1] in FUSED_HEAD_WIDTHS:
        return
    if math.prod(q.shape[:-1]) * k.shape[-2] > LARGEST_SCORES:
        yield f"q {_shown(q)} and k {_shown(k)} make more than 2^30 scores"
    if q.shape[-2] > LARGEST_ROWS:
        yield f"q {_shown(q)} has more than {LARGEST_ROWS} rows, whose scores are written out"


def _channels_last(call: Call) -> Iterator[str]:
    """NCHW only. Views, copies and elementwise work may see any strides."""
    for value in call.leaves:
        if isinstance(value, torch.memory_format) and value in CHANNELS_LAST:
            yield f"asks for {value}"
    if call.name == "copy_" or _is_view(call.func) or torch.Tag.pointwise in call.func.tags:
        return
    for tensor in call.tensors:
        if tensor.dim() != 4 or tensor.is_contiguous():
            continue
        if tensor.is_contiguous(memory_format=torch.channels_last):
            yield f"{_shown(tensor)} is channels-last"


def _random(call: Call) -> Iterator[str]:
    """Noise comes from the host."""
    if torch.Tag.nondeterministic_seeded in call.func.tags and call.name != ATTENTION:
        yield "draws random numbers on the device"


def _mixed(call: Call) -> Iterator[str]:
    """Copies wait; other operators take no more than a scalar from the host."""
    host = [tensor for tensor in call.tensors if not isinstance(tensor, PretendTensor)]
    if call.name == "copy_":
        if host and (call.args[2:] or [call.kwargs.get("non_blocking")])[0]:
            yield "does not wait for a copy between host and device"
        return
    for tensor in host:
        if tensor.dim() > 0:
            yield f"takes {_shown(tensor)} to tensors of the device"


def _scaled_by_zero(call: Call) -> Iterator[str]:
    """beta = 0 keeps the NaN of memory that was never set."""
    if call.name.rstrip("_") in SCALED_SUMS and call.kwargs.get("beta", 1) == 0:
        yield "beta is 0"


RULES: dict[str, Callable[[Call], Iterator[str]]] = {
    "dtype": _dtypes,
    "size": _sizes,
    "attention": _attention,
    "channels last": _channels_last,
    "random": _random,
    "mixed devices": _mixed,
    "beta": _scaled_by_zero,
}


def _kind(call: Call) -> str:
    if call.name == "copy_":
        target, source = call.args[:2]
        if not isinstance(target, PretendTensor):
            return "download"
        return "kernel" if isinstance(source, PretendTensor) else "upload"
    if call.name == "_unsafe_view" or _is_view(call.func):
        return "view"
    if call.name in ALLOCATIONS:
        return "allocation"
    return "wait" if _needs_values(call) else "kernel"


def _needs_values(call: Call) -> bool:
    """Whether the host must know values before it can go on."""
    if call.name.startswith("index."):  # tagged for the sake of boolean masks
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in call.tensors[1:])
    tags = call.func.tags
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


@cache
def _is_view(func: Any) -> bool:
    """Whether the results share memory with an argument and nothing is written."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _shown(tensor: Tensor) -> str:
    where = "" if isinstance(tensor, PretendTensor) else "the host's "
    return f"{where}{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
