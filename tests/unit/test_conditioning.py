"""The cache of text embeddings: bounded in bytes, least recently used first, counted."""

from __future__ import annotations

from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxcore.pipeline.conditioning import ConditioningCache

A, B, C, D = (1,), (1, 2), (2, 1), (9, 9, 9)


def embeddings(size: int, fill: float = 0.0) -> torch.Tensor:
    """``size`` bytes."""
    return torch.full((size,), fill).to(torch.uint8)


def test_what_is_kept_is_given_back_and_counted() -> None:
    cache = ConditioningCache(100)
    first, second = embeddings(10), embeddings(20)
    assert cache.get(A) is None
    cache.put(A, first)
    cache.put(B, second)
    assert cache.get(A) is first
    assert cache.get(B) is second
    assert cache.get(C) is None
    assert (cache.hits, cache.misses) == (2, 2)
    assert (cache.entries, cache.bytes_used, cache.bytes_limit) == (2, 30, 100)


def test_the_least_recently_used_goes_first() -> None:
    cache = ConditioningCache(30)
    for key in (A, B, C):
        cache.put(key, embeddings(10))
    assert cache.get(A) is not None  # now B is the oldest
    cache.put(D, embeddings(10))
    assert cache.get(B) is None
    assert all(cache.get(key) is not None for key in (A, C, D))


def test_putting_counts_as_using() -> None:
    cache = ConditioningCache(20)
    cache.put(A, embeddings(10))
    cache.put(B, embeddings(10))
    cache.put(A, embeddings(10, 1))
    cache.put(C, embeddings(10))
    assert cache.get(B) is None
    kept = cache.get(A)
    assert kept is not None
    assert kept[0] == 1


def test_as_many_go_as_a_large_one_needs() -> None:
    cache = ConditioningCache(30)
    for key in (A, B, C):
        cache.put(key, embeddings(10))
    cache.put(D, embeddings(15))
    assert (cache.entries, cache.bytes_used) == (2, 25)
    assert cache.get(C) is not None


def test_one_that_is_too_large_is_not_kept_and_drives_nothing_out() -> None:
    cache = ConditioningCache(30)
    cache.put(A, embeddings(10))
    cache.put(B, embeddings(31))
    assert cache.get(B) is None
    assert cache.get(A) is not None
    assert cache.bytes_used == 10
    cache.put(A, embeddings(31))
    assert cache.get(A) is None, "the older embeddings are not given for newer ones"
    assert cache.bytes_used == 0


def test_one_that_just_fits_is_kept() -> None:
    cache = ConditioningCache(30)
    cache.put(A, embeddings(30))
    assert cache.get(A) is not None


def test_a_limit_of_0_keeps_nothing() -> None:
    cache = ConditioningCache(0)
    cache.put(A, embeddings(1))
    assert cache.get(A) is None
    assert (cache.entries, cache.bytes_used, cache.misses) == (0, 0, 1)


def test_clearing_forgets_all_but_the_counters() -> None:
    cache = ConditioningCache(30)
    cache.put(A, embeddings(10))
    cache.get(A)
    cache.get(B)
    cache.clear()
    assert (cache.entries, cache.bytes_used) == (0, 0)
    assert (cache.hits, cache.misses) == (1, 1)
    assert cache.get(A) is None


def test_pinned_ones_stay_whatever_comes() -> None:
    cache = ConditioningCache(20, pinned=(A,))
    cache.put(A, embeddings(50))
    for key in (B, C, D):
        cache.put(key, embeddings(10))
    assert cache.get(A) is not None
    assert (cache.entries, cache.bytes_used) == (3, 20)
    cache.clear()
    assert cache.get(A) is None, "a fault may lie in it, too"


OPERATIONS = st.lists(
    st.tuples(st.integers(0, 6), st.none() | st.integers(0, 60)), min_size=1, max_size=60
)


@given(limit=st.integers(0, 120), operations=OPERATIONS)
def test_the_bound_holds_and_the_contents_are_those_of_a_plain_model(
    limit: int, operations: list[tuple[int, int | None]]
) -> None:
    cache = ConditioningCache(limit)
    model: OrderedDict[int, torch.Tensor] = OrderedDict()
    hits = misses = 0
    for key, size in operations:
        if size is None:
            found = cache.get((key,))
            assert found is model.get(key)
            hits, misses = hits + (found is not None), misses + (found is None)
            if found is not None:
                model.move_to_end(key)
        else:
            value = embeddings(size)
            cache.put((key,), value)
            model.pop(key, None)
            if size <= limit:
                model[key] = value
            while sum(v.nbytes for v in model.values()) > limit:
                model.popitem(last=False)
        assert cache.bytes_used == sum(v.nbytes for v in model.values()) <= limit
        assert cache.entries == len(model)
        assert (cache.hits, cache.misses) == (hits, misses)
