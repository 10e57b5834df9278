"""Text embeddings, and the cache that keeps the recent ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the transformer is told about one prompt.

    Attributes:
        embeddings: [1, 512, 3 D] in the encoder's residual dtype, on the device.
        token_count: tokens of the prompt with its template, at most 512.
        truncated_tokens: tokens that did not fit and were cut.
        cache_hit: whether the encoder was spared.
    """

    embeddings: Tensor
    token_count: int
    truncated_tokens: int
    cache_hit: bool


class Store(Protocol):
    """Where embeddings outlive the process."""

    def load(self, ids: TokenIds) -> Tensor | None: ...
    def save(self, ids: TokenIds, embeddings: Tensor) -> None: ...
    def forget(self) -> None: ...


class ConditioningCache:
    """Least-recently-used embeddings by token ids, bounded in bytes.

    Used from the thread that owns the device; the counters may be read from any.

    Args:
        pinned: ids whose embeddings stay, whatever else comes, and count towards no bound.
        store: asked for what is not in memory, and told of all that is put here.
    """

    def __init__(
        self, bytes_limit: int, pinned: Collection[TokenIds] = (), store: Store | None = None
    ) -> None:
        self.bytes_limit = bytes_limit
        self.bytes_used = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[TokenIds, Tensor] = OrderedDict()
        self._pins = frozenset(pinned)
        self._pinned: dict[TokenIds, Tensor] = {}
        self._store = store

    @property
    def entries(self) -> int:
        return len(self._kept) + len(self._pinned)

    def get(self, ids: TokenIds) -> Tensor | None:
        """The embeddings of these ids, counted as a hit; None is counted as a miss."""
        found = self._pinned.get(ids)
        if found is None and ids in self._kept:
            found = self._kept[ids]
            self._kept.move_to_end(ids)
        if found is None and self._store is not None:
            found = self._store.load(ids)
            if found is not None:
                self._keep(ids, found)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def put(self, ids: TokenIds, embeddings: Tensor) -> None:
        """Keep embeddings, dropping the oldest until they fit; too large ones are not kept."""
        self._keep(ids, embeddings)
        if self._store is not None:
            self._store.save(ids, embeddings)

    def _keep(self, ids: TokenIds, embeddings: Tensor) -> None:
        if ids in self._pins:
            self._pinned[ids] = embeddings
            return
        if ids in self._kept:
            self.bytes_used -= self._kept.pop(ids).nbytes
        if embeddings.nbytes > self.bytes_limit:
            return
        self._kept[ids] = embeddings
        self.bytes_used += embeddings.nbytes
        while self.bytes_used > self.bytes_limit:
            _, dropped = self._kept.popitem(last=False)
            self.bytes_used -= dropped.nbytes

    def forget_memory(self) -> None:
        """Forget all embeddings but those in the store; the counters stay."""
        self._kept.clear()
        self._pinned.clear()
        self.bytes_used = 0

    def clear(self) -> None:
        """Forget all embeddings, those in the store, too."""
        self.forget_memory()
        if self._store is not None:
            self._store.forget()
