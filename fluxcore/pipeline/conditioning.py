"""Text embeddings, and the cache that keeps the recent ones."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


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


class ConditioningCache:
    """Least-recently-used embeddings by token ids, bounded in bytes.

    Used from the thread that owns the device; the counters may be read from any.
    """

    def __init__(self, bytes_limit: int) -> None:
        self.bytes_limit = bytes_limit
        self.bytes_used = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    @property
    def entries(self) -> int:
        return len(self._kept)

    def get(self, ids: tuple[int, ...]) -> Tensor | None:
        """The embeddings of these ids, counted as a hit; None is counted as a miss."""
        found = self._kept.get(ids)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(ids)
        return found

    def put(self, ids: tuple[int, ...], embeddings: Tensor) -> None:
        """Keep embeddings, dropping the oldest until they fit; too large ones are not kept."""
        if ids in self._kept:
            self.bytes_used -= self._kept.pop(ids).nbytes
        if embeddings.nbytes > self.bytes_limit:
            return
        self._kept[ids] = embeddings
        self.bytes_used += embeddings.nbytes
        while self.bytes_used > self.bytes_limit:
            _, dropped = self._kept.popitem(last=False)
            self.bytes_used -= dropped.nbytes

    def clear(self) -> None:
        """Forget all embeddings; the counters stay."""
        self._kept.clear()
        self.bytes_used = 0
