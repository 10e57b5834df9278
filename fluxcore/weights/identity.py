"""Telling one component's weights from another's without reading them all.

What is derived from weights and kept beyond the process is filed under this. Reading
gigabytes to hash them would cost more than what is kept there saves, so a little of
every tensor is looked at, together with size and time of the files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fluxcore.errors import CheckpointFileError
from fluxcore.weights.files import stored_tensors
from fluxcore.weights.layout import STEMS

SAMPLE_BYTES = 256
"""Looked at in every tensor; no training and no merging of weights leaves them as they were."""


def component_identity(directory: Path) -> str:
    """A digest that changes with a component's config or weights.

    Raises:
        CheckpointError: the component cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = stored_tensors(directory, STEMS[directory.name])
    try:
        digest.update((directory / "config.json").read_bytes())
        for file in sorted({tensor.file for tensor in tensors.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            with file.open("rb", buffering=0) as stream:
                for name, tensor in sorted(tensors.items()):
                    if tensor.file != file:
                        continue
                    digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
                    stream.seek(tensor.offset)
                    digest.update(stream.read(min(SAMPLE_BYTES, tensor.bytes)))
    except OSError as error:
        raise CheckpointFileError(f"{directory} cannot be read: {error}") from error
    return digest.hexdigest()
