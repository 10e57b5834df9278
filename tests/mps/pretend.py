"""A device that calls itself mps, for machines without one.

Owns tensors that report ``mps:0`` while their values lie on the host (storage ``cpu``)
or nowhere (storage ``meta``, for sizes that fit no memory). PyTorch's own C++ code sees
the device type and takes its MPS branches; every operator that would reach a Metal
kernel reaches ``PretendDevice.kernel`` instead. Knows nothing of what is right or wrong
on that device; ``tests.mps.audit`` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("mps", 0)

# c10/core/DeviceType.h, whose numbers are part of the binary interface.
_CPU, _MPS, _META = 0, 13, 14
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"

_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)

Function = Callable[..., Any]


class PretendTensor(torch.Tensor):
    """Reports ``mps:0``; ``storage_tensor`` has the values, in the same shape and strides."""

    storage_tensor: Tensor

    @staticmethod
    def __new__(cls, storage: Tensor) -> PretendTensor:
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            storage.size(),
            strides=storage.stride(),
            storage_offset=storage.storage_offset(),
            dtype=storage.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        tensor.storage_tensor = storage
        return tensor

    def __repr__(self, **_: object) -> str:
        return f"PretendTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.tolist:  # refuses subclasses; a device's tensor goes to the host
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a pretended device outside of PretendDevice")


class PretendDevice(TorchDispatchMode):
    """While active, ``device="mps:0"`` works, and inference mode is on.

    Args:
        storage: ``cpu`` computes, ``meta`` tracks shapes only.
    """

    def __init__(self, storage: str = "cpu") -> None:
        super().__init__()
        self.storage = torch.device(storage)
        self._around = ExitStack()

    def __enter__(self) -> Self:
        self._around.enter_context(_device_guard())
        self._around.enter_context(torch.inference_mode())
        self._around.enter_context(_HostFactories())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_is_device(value) for value in flat((args, kwargs))):
            return func(*args, **kwargs)
        return self.kernel(func, args, kwargs)

    def kernel(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator of which some tensor or the ``device`` argument is the device."""
        return self.compute(func, args, kwargs)

    def decompose(self, func: Any, key: str, args: Any, kwargs: Any) -> Any:
        """Run an operator's C++ composite kernel; its pieces come back to ``kernel``."""
        super().__enter__()
        try:
            out = func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        finally:
            super().__exit__(None, None, None)
        for value in flat([out]):
            built = isinstance(value, PretendTensor) or not isinstance(value, Tensor)
            assert built or value.device.type == "cpu", f"{func} cannot be taken apart"
        return out

    def compute(self, func: Function, args: Any, kwargs: Any) -> Any:
        """Run ``func`` on the storage behind the tensors and wrap what comes out."""
        given = {
            id(value.storage_tensor if isinstance(value, PretendTensor) else value): value
            for value in flat((args, kwargs))
            if isinstance(value, Tensor)
        }

        def wrapped(result: Tensor) -> Tensor:
            # what was written into is given back as itself, on whichever side it lies
            return given[id(result)] if id(result) in given else PretendTensor(result)

        return _mapped(wrapped, func(*self._stored(args), **self._stored(kwargs)), Tensor)

    def _stored(self, values: Any) -> Any:
        def stored(value: PretendTensor | torch.device) -> Tensor | torch.device:
            if isinstance(value, PretendTensor):
                return value.storage_tensor
            return self.storage if value.type == DEVICE.type else value

        return _mapped(stored, values, (PretendTensor, torch.device))


class _HostFactories(TorchFunctionMode):
    """Makes tensors from data on the host first, as PyTorch does below its dispatcher."""

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FROM_DATA and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def _device_guard() -> Iterator[None]:
    """Lend the meta device's guard, which does nothing, to a build that has none for MPS.

    PyTorch switches to a tensor's device around many calls and fails where the device
    type has no guard. A build with MPS has one, and is left alone.
    """
    directory = Path(torch.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(directory.glob("libc10.*"))))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _GUARDS)
    assert all((guards[_CPU], guards[_META])), "the table of device guards has another layout"
    lent = not guards[_MPS]
    if lent:
        guards[_MPS] = guards[_META]
    try:
        yield
    finally:
        if lent:
            guards[_MPS] = None


def flat(values: Any) -> list[Any]:
    """Every leaf of nested tuples, lists and dicts."""
    leaves: list[Any] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list, dict)):
            leaves += flat(value)
        else:
            leaves.append(value)
    return leaves


def _mapped(change: Function, values: Any, kinds: type | tuple[type, ...]) -> Any:
    """Nested tuples, lists and dicts with every leaf of some kinds changed."""
    if isinstance(values, kinds):
        return change(values)
    if isinstance(values, (tuple, list)):
        return type(values)([_mapped(change, value, kinds) for value in values])
    if isinstance(values, dict):
        return {name: _mapped(change, value, kinds) for name, value in values.items()}
    return values


def _is_device(value: Any) -> bool:
    if isinstance(value, PretendTensor):
        return True
    return isinstance(value, torch.device) and value.type == DEVICE.type
