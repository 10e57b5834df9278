"""Layers whose weights are on the device only while they run.

Owns two buffers of the largest layer's size, the thread that fills the next one while
the device works, and the hooks that lend a buffer to a layer. Knows nothing of files or
networks: a layer says how long it is and how to fill a buffer with it.

The arithmetic is that of resident weights, value by value, so the pictures are the same, but where
a device's own kernels take resident weights in a layout of theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT_BYTES = 256
"""Every weight begins at a multiple of it, as an allocation of its own would."""


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter of a layer, and where it lies in the layer's buffer. Units: bytes."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def in_buffer(self, buffer: Tensor) -> Tensor:
        """The parameter's values, as a view. Shapes: buffer [bytes] uint8 -> ``shape``."""
        return buffer[self.offset : self.offset + self.bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class StreamedLayer:
    """A module without weights of its own.

    Attributes:
        fill: writes all parts into a buffer of at least ``bytes`` on the host; called on
            the reading thread.
    """

    module: nn.Module
    parts: tuple[Part, ...]
    bytes: int
    fill: Callable[[Tensor], None]

    def lend(self, buffer: Tensor) -> None:
        """Let the module work with the weights in a buffer."""
        for part in self.parts:
            self._set(part, nn.Parameter(part.in_buffer(buffer), requires_grad=False))

    def take_back(self) -> None:
        """Leave the module without weights, so that a use at the wrong time fails."""
        for part in self.parts:
            empty = torch.empty(part.shape, dtype=part.dtype, device="meta")
            self._set(part, nn.Parameter(empty, requires_grad=False))

    def _set(self, part: Part, value: nn.Parameter) -> None:
        owner, _, leaf = part.name.rpartition(".")
        setattr(self.module.get_submodule(owner), leaf, value)


class LayerStream:
    """Brings layers' weights in turn, each while the one before it runs.

    Used from the thread that owns the device. A layer that comes out of turn is waited
    for, and nothing else.

    Args:
        layers: in the order in which they usually run.
        following: for each layer, the index of the one that usually runs next.
        keep_on_host: keep all layers in host memory and only copy them to the device;
            without it they are read from disk each time.
    """

    def __init__(
        self,
        layers: Sequence[StreamedLayer],
        following: Sequence[int],
        device: torch.device,
        *,
        keep_on_host: bool = False,
    ) -> None:
        self._layers = layers
        self._following = following
        self._buffer_bytes = max(layer.bytes for layer in layers)
        self._uploads = _uploads(device, self._buffer_bytes)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fluxd-layers")
        weakref.finalize(self, self._reader.shutdown, wait=False)
        self._kept: list[_HostBuffer] = []
        self._staging: list[_HostBuffer] = []
        self._current = 0
        pinned = device.type == "cuda"
        if keep_on_host:
            self._kept = [_HostBuffer(layer.bytes, pinned) for layer in layers]
            for buffer, layer in zip(self._kept, layers, strict=True):
                layer.fill(buffer.bytes)
        else:
            count = 1 if isinstance(self._uploads, _BlockingUploads) else 2
            self._staging = [_HostBuffer(self._buffer_bytes, pinned) for _ in range(count)]
        for index, layer in enumerate(layers):
            self._attach(index, layer)

    @property
    def device_bytes(self) -> int:
        """What the buffers take on the device, in place of all the layers."""
        on_host = 0 if self._uploads is not None else len(self._staging)
        slots = on_host if self._uploads is None else self._uploads.count
        return slots * self._buffer_bytes

    def _attach(self, index: int, layer: StreamedLayer) -> None:
        # The module must not keep the stream alive, nor the stream itself through the module.
        stream = weakref.ref(self)

        def enter(*_: object) -> None:
            owner = stream()
            assert owner is not None, "a stream outlives its layers' last use"
            owner._enter(index)

        def leave(*_: object) -> None:
            owner = stream()
            assert owner is not None, "a stream outlives its layers' last use"
            owner._leave(index)

        layer.take_back()
        layer.module.register_forward_pre_hook(enter)
        layer.module.register_forward_hook(leave, always_call=True)

    def _enter(self, index: int) -> None:
        layer = self._layers[index]
        host = self._on_host(index)
        placed = host.bytes if self._uploads is None else self._uploads.upload(host, layer.bytes)
        layer.lend(placed)
        if self._staging:
            self._read_ahead(self._following[index])

    def _leave(self, index: int) -> None:
        self._layers[index].take_back()
        if self._uploads is not None:
            self._uploads.used()

    def _on_host(self, index: int) -> _HostBuffer:
        """The layer in host memory, waited for."""
        if self._kept:
            return self._kept[index]
        holding = [n for n, buffer in enumerate(self._staging) if buffer.layer == index]
        number = holding[0] if holding else self._other()
        buffer = self._staging[number]
        if not holding:
            self._read(index, buffer)
        assert buffer.filled is not None, "it was read, or is being read"
        try:
            buffer.filled.result()
        except BaseException:
            buffer.layer = None  # the next use tries again
            raise
        self._current = number
        return buffer

    def _read_ahead(self, index: int) -> None:
        buffer = self._staging[self._other()]
        if index not in (buffer.layer, self._staging[self._current].layer):
            self._read(index, buffer)

    def _other(self) -> int:
        """The staging buffer that no layer is using."""
        return (self._current + 1) % len(self._staging)

    def _read(self, index: int, buffer: _HostBuffer) -> None:
        layer = self._layers[index]

        def fill() -> None:
            if buffer.uploaded is not None:
                buffer.uploaded.synchronize()
            layer.fill(buffer.bytes)

        buffer.layer = index
        buffer.filled = self._reader.submit(fill)


class _HostBuffer:
    """Host memory for one layer.

    Attributes:
        layer: index of the layer that it holds, or is to hold.
        filled: done once it holds it.
        uploaded: on CUDA, when its last upload is over.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.layer: int | None = None
        self.filled: Future[None] | None = None
        self.uploaded: torch.cuda.Event | None = None


class _BlockingUploads:
    """One buffer on the device, filled when all that was queued is done: as MPS demands."""

    count = 1

    def __init__(self, device: torch.device, size: int) -> None:
        self._slot = torch.empty(size, dtype=torch.uint8, device=device)

    def upload(self, host: _HostBuffer, size: int) -> Tensor:
        self._slot[:size].copy_(host.bytes[:size])
        return self._slot

    def used(self) -> None:
        """The order of the device's one queue is enough."""


class _CudaUploads:
    """Two buffers on the device: one is filled while the layer in the other runs."""

    count = 2

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._used: list[torch.cuda.Event | None] = [None, None]
        self._stream = torch.cuda.Stream(device)
        self._turn = 0

    def upload(self, host: _HostBuffer, size: int) -> Tensor:
        self._turn = 1 - self._turn
        slot, used = self._slots[self._turn], self._used[self._turn]
        if used is not None:
            self._stream.wait_event(used)
        with torch.cuda.stream(self._stream):
            slot[:size].copy_(host.bytes[:size], non_blocking=True)
            host.uploaded = torch.cuda.Event()
            host.uploaded.record()
        torch.cuda.current_stream(self._device).wait_event(host.uploaded)
        return slot

    def used(self) -> None:
        """The layer in the slot has been queued; the slot is free after it."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._used[self._turn] = event


def _uploads(device: torch.device, size: int) -> _BlockingUploads | _CudaUploads | None:
    """How layers get from host memory onto a device; None where that is the same memory."""
    if device.type == "cpu":
        return None
    return _CudaUploads(device, size) if device.type == "cuda" else _BlockingUploads(device, size)
