"""Text embeddings on disk, so that a restart keeps them.

One safetensors file for each prompt, named by a digest of its tokens and of all that
decides the values: weights, device, dtypes and versions. So what is found is what the
encoder would give, bit for bit, and no file holds a prompt. Reading happens where
embeddings are needed, writing and clearing up on a thread of its own. A disk that fails
costs nothing but the time to encode again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fluxcore.pipeline.conditioning import TokenIds
from fluxcore.version import __version__

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
PARTIAL = ".partial"
MOST_WAITING = 16
"""Files that may wait to be written; what comes beyond them is not kept."""
ABANDONED_S = 3600.0
"""Age from which a half-written file belongs to a process that is gone."""
HEADER_BYTES = 4096


class EmbeddingStore:
    """A directory of embeddings, the least recently used of which go first.

    Several processes may use one directory. ``load``, ``save`` and ``forget`` are called from
    the thread that owns the device.

    Args:
        bytes_limit: of all files together.
        shape, dtype: of every embedding.
        placed: brings what was loaded to the device, in a dtype.
        decides: what the values depend on besides the tokens.
        begin_to_host: begins a copy; what waits for it may be called from any thread.
    """

    def __init__(
        self,
        directory: Path,
        bytes_limit: int,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        placed: Callable[[Tensor, torch.dtype], Tensor],
        decides: Mapping[str, str],
        begin_to_host: Callable[[Tensor], Callable[[], list[Tensor]]],
    ) -> None:
        self._directory = directory
        self._bytes_limit = bytes_limit
        self._begin_to_host = begin_to_host
        self._shape, self._dtype, self._placed = shape, dtype, placed
        described = "\n".join(f"{name}={value}" for name, value in sorted(decides.items()))
        self._seed = hashlib.blake2b(f"{__version__}\n{described}".encode()).digest()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fluxd-embeddings")
        self._waiting: list[Future[None]] = []
        self._has_warned = False
        self._warning = threading.Lock()
        # Whether what it holds may be wrong and could not be removed.
        self._is_spoilt = False
        self.hits = 0

    def load(self, ids: TokenIds) -> Tensor | None:
        """The embeddings of these ids, on the device; None where there are none to be trusted."""
        if self._is_spoilt:
            return None
        path = self._path(ids)
        try:
            with path.open("rb") as stream:
                found = self._read(stream.read(self._largest_bytes + 1))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(f"{path} is not used: {error}; it is made anew")
            self._in_background(path.unlink, missing_ok=True)
            return None
        self.hits += 1
        self._in_background(os.utime, path)
        return self._placed(found, self._dtype)

    def save(self, ids: TokenIds, embeddings: Tensor) -> None:
        """Write embeddings in the background, if they are not there yet."""
        if self._largest_bytes <= self._bytes_limit and not self._is_spoilt:
            # Begun here, because only this thread may touch the device.
            self._in_background(self._write, self._path(ids), self._begin_to_host(embeddings))

    def forget(self) -> None:
        """Remove all that is kept. Where that fails, this process does without the store."""
        self.wait()
        failed: list[OSError] = []
        for path in self._directory.glob(f"*{SUFFIX}"):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                failed.append(error)
        if failed and not self._is_spoilt:
            logger.warning(
                "text embeddings that may be wrong cannot be removed: %s; until the service is "
                "started again none are read or kept; remove %s before that",
                failed[0],
                self._directory,
            )
        self._is_spoilt = bool(failed)

    def wait(self) -> None:
        """Wait until everything is written."""
        for future in self._waiting:
            future.exception()

    @property
    def _largest_bytes(self) -> int:
        return HEADER_BYTES + self._dtype.itemsize * torch.Size(self._shape).numel()

    def _path(self, ids: TokenIds) -> Path:
        digest = hashlib.blake2b(self._seed, digest_size=20)
        digest.update(" ".join(map(str, ids)).encode())
        return self._directory / f"{digest.hexdigest()}{SUFFIX}"

    def _read(self, data: bytes) -> Tensor:
        """Raises ValueError where it is not what was written."""
        try:
            found = load(data)
            embeddings, checksum = found["embeddings"], int(found["crc32"])
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"it is corrupt ({error})") from None
        if embeddings.shape != self._shape or embeddings.dtype != self._dtype:
            raise ValueError(f"it holds {embeddings.dtype} {list(embeddings.shape)}")
        if _checksum(embeddings) != checksum:
            raise ValueError("its checksum is wrong")
        return embeddings

    def _write(self, path: Path, copied: Callable[[], list[Tensor]]) -> None:
        if path.exists():
            return
        embeddings = copied()[0].contiguous()
        checksum = torch.tensor(_checksum(embeddings))
        data = save({"embeddings": embeddings, "crc32": checksum})
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Readable to this user only, and whole or not there at all.
        descriptor, partial = tempfile.mkstemp(suffix=PARTIAL, dir=self._directory)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
        self._clear_up()

    def _clear_up(self) -> None:
        """Remove the least recently used until the rest fits, and what others left half done."""
        files = []
        for entry in os.scandir(self._directory):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process was quicker
            if entry.name.endswith(SUFFIX):
                files.append((status.st_mtime_ns, status.st_size, entry.path))
            elif entry.name.endswith(PARTIAL) and time.time() - status.st_mtime > ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
        excess = sum(size for _, size, _ in files) - self._bytes_limit
        for _, size, oldest in sorted(files):
            if excess <= 0:
                break
            Path(oldest).unlink(missing_ok=True)
            excess -= size

    def _in_background(self, work: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run ``work`` on the writer's thread, unless too much waits there already."""
        self._waiting = [future for future in self._waiting if not future.done()]
        if len(self._waiting) >= MOST_WAITING:
            return

        def attempt() -> None:
            try:
                work(*args, **kwargs)
            except FileNotFoundError:
                pass  # gone meanwhile, by another process
            except OSError as error:
                self._warn(f"text embeddings are not kept in {self._directory}: {error}")

        self._waiting.append(self._writer.submit(attempt))

    def _warn(self, message: str) -> None:
        """Once: a disk that fails does so for every prompt."""
        with self._warning:
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
        logger.log(level, "%s", message)


def _checksum(embeddings: Tensor) -> int:
    return zlib.crc32(embeddings.reshape(-1).view(torch.uint8).numpy().data)
