"""The safetensors files of one component: which tensor lies where, and its bytes.

Bytes are read straight into the tensor that will hold them. The library's own
reader maps the whole file, and mapped pages count against the process on top of
the weights; reading in place keeps the peak at the weights' own size.

Source of the format: huggingface/safetensors README ("Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxcore.errors import CheckpointFileError, CheckpointNotFoundError
from fluxcore.runtime import write_in_place

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
HEADER_LENGTH_BYTES = 8
READERS = 4
"""Threads that read one tensor."""
PIECE_BYTES = 2**23
"""What one of them reads at a time."""
BUFFER_BYTES = 2**26
"""Memory of the host through which weights come to a device."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies on disk."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, target: Tensor, first: int = 0) -> None:
        """Fill ``target`` (contiguous, on the host, of this dtype) from disk.

        Large ones are read by several threads: one alone copies more slowly than memory can.

        Args:
            first: number of the element to begin with.

        Raises:
            CheckpointFileError: the file ends early or cannot be read.
        """
        view = target.reshape(-1).view(torch.uint8).numpy().data
        offset = self.offset + first * self.dtype.itemsize
        try:
            with self.file.open("rb", buffering=0) as stream:
                starts = range(0, len(view), PIECE_BYTES)
                read = partial(self._read_piece, stream.fileno(), view, offset)
                for _ in _readers().map(read, starts) if len(starts) > 1 else map(read, starts):
                    pass
        except OSError as error:
            raise CheckpointFileError(f"{self.file} cannot be read: {error}") from error

    def _read_piece(self, file: int, view: memoryview, offset: int, start: int) -> None:
        """The bytes of ``view`` from ``start`` on, up to the next piece."""
        end = min(start + PIECE_BYTES, len(view))
        while start < end:
            count = os.preadv(file, [view[start:end]], offset + start)
            if not count:
                raise CheckpointFileError(
                    f"{self.file} ends early, {len(view) - start} bytes short; download it again"
                )
            start += count


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="read-weights")


def read_stacked(tensors: Sequence[StoredTensor], target: Tensor) -> None:
    """Read tensors into ``target``, stacked along dimension 0.

    On the host and on MPS straight into its memory, where the dtype is that of the file;
    elsewhere through a buffer of the host, which is pinned for CUDA.
    """
    if not write_in_place(target, partial(_read_stacked, tensors)):
        _read_stacked(tensors, target)


def _read_stacked(tensors: Sequence[StoredTensor], target: Tensor) -> None:
    row = 0
    for tensor in tensors:
        part = target[row : row + tensor.shape[0]]
        row += tensor.shape[0]
        if part.device.type == "cpu" and part.dtype == tensor.dtype and part.is_contiguous():
            tensor.read_into(part)
        elif part.is_contiguous():
            _read_through_buffer(tensor, part.view(-1))
        else:
            staged = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor.read_into(staged)
            part.copy_(staged)


def _read_through_buffer(tensor: StoredTensor, flat: Tensor) -> None:
    size = max(1, min(flat.numel(), BUFFER_BYTES // tensor.dtype.itemsize))
    buffer = torch.empty(size, dtype=tensor.dtype, pin_memory=flat.is_cuda)
    for first in range(0, flat.numel(), size):
        part = flat[first : first + size]
        staged = buffer[: len(part)]
        tensor.read_into(staged, first)
        part.copy_(staged)


def stored_tensors(directory: Path, stem: str) -> dict[str, StoredTensor]:
    """All tensors of a component, by published name; no weights are read.

    Takes ``{stem}.safetensors.index.json`` with its shards, or the single file
    ``{stem}.safetensors``.

    Raises:
        CheckpointNotFoundError: neither is there, or a shard is missing.
        CheckpointFileError: an index or a file is corrupt or truncated.
    """
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    if index.is_file():
        return _sharded(index)
    if single.is_file():
        return _read_header(single)
    pickles = sorted(p.name for p in directory.glob("*.bin"))
    hint = f" ({', '.join(pickles)} is pickle, which is never loaded)" if pickles else ""
    raise CheckpointNotFoundError(
        f"no weights in {directory}: expected {single.name} or {index.name}{hint}; "
        "download the directory again"
    )


def _sharded(index: Path) -> dict[str, StoredTensor]:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): Path(str(shard)) for name, shard in shard_of.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointFileError(
            f"{index} is not a valid index of safetensors shards ({error}); download it again"
        ) from error
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(names.values())):
        if shard.name != str(shard):
            raise CheckpointFileError(f"{index} names a file outside its directory: {shard}")
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"{path} is missing, though {index.name} lists it; download it again"
            )
        tensors = _read_header(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointFileError(
                f"{path} holds {twice[0]}, and so does {found[twice[0]].file.name}; "
                "download the directory again"
            )
        found |= tensors
    lost = sorted(set(names) - set(found))
    if lost:
        raise CheckpointFileError(
            f"{index} lists {len(lost)} tensors that no shard holds, {lost[0]} among them; "
            "download the directory again"
        )
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Offsets from the file's header, once the library has checked the whole of it."""
    try:
        with safe_open(path, framework="numpy") as checked:
            names = list(checked.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointFileError(
            f"{path} is corrupt, truncated or not a safetensors file ({error}); download it again"
        ) from error
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
    start = HEADER_LENGTH_BYTES + length
    found = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointFileError(
                f"{path}: {name} is stored as {entry['dtype']}; "
                f"this program reads {', '.join(DTYPES)}: use the bf16 checkpoint"
            )
        found[name] = StoredTensor(
            file=path,
            offset=start + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=DTYPES[entry["dtype"]],
        )
    return found
