"""Shuffle and packing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.permutation import Permutation
from megatron_a2d.utils.errors import UserError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """1,003 tokens 0, 1, 2, ... in documents of 1, 2, ..., 44 and a last one of 13."""
    builder = IndexedDatasetBuilder(str(tmp_path / "count.bin"), dtype=np.int32)
    start, length = 0, 1
    while start < 1003:
        stop = min(start + length, 1003)
        builder.add_document(np.arange(start, stop), [stop - start])
        start, length = stop, length + 1
    builder.finalize(str(tmp_path / "count.idx"))
    return str(tmp_path / "count")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 9, 10, 100, 1000, 4096, 4097])
@pytest.mark.parametrize("key", [(0,), (1,), (1234, 7), (2**70, 3)])
def test_permutation_is_a_bijection(size, key):
    permutation = Permutation(size, *key)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


def test_permutation_of_a_huge_range():
    size = 10**13 + 37
    permutation = Permutation(size, 5)
    places = [permutation(i) for i in range(2000)] + [permutation(size - 1 - i) for i in range(2000)]
    assert len(set(places)) == 4000 and all(0 <= place < size for place in places)
    assert abs(np.mean(places) / size - 0.5) < 5 * math.sqrt(1 / 12 / 4000)


def test_permutation_refuses_what_is_outside():
    for index in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 0)(index)
    with pytest.raises(ValueError, match="size must be 1 or more"):
        Permutation(0, 0)


@pytest.mark.parametrize("size", [1000, 4097])
def test_permutation_looks_random(size):
    for key in range(5):
        places = np.array([Permutation(size, key)(i) for i in range(size)])
        index = np.arange(size)
        # Mean |place - i| of a random permutation is (n^2 - 1) / 3n; its deviation about n * sqrt(2/45/n).
        assert abs(np.abs(places - index).mean() - size / 3) < 5 * size * math.sqrt(2 / 45 / size)
        # Fixed points and neighbours that stay neighbours are Poisson, with mean 1.
        assert (places == index).sum() < 8
        assert (np.diff(places) == 1).sum() < 8
        # Neighbours are not correlated, at any short distance.
        for lag in (1, 2, 7, math.isqrt(size)):
            assert abs(np.corrcoef(places[:-lag], places[lag:])[0, 1]) < 5 / math.sqrt(size)


def test_the_randomness_test_can_fail():
    index = np.arange(1000)
    assert abs(np.abs((index * 7 + 3) % 1000 - index).mean() - 1000 / 3) < 40  # a linear map shuffles far, but
    assert abs(np.corrcoef((index * 7 + 3)[:-1] % 1000, (index * 7 + 3)[1:] % 1000)[0, 1]) > 5 / math.sqrt(1000)


def test_all_orders_of_three_occur_equally():
    orders = [tuple(Permutation(3, key)(i) for i in range(3)) for key in range(3000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 400  # 500 expected, deviation 20


def test_keys_give_different_orders():
    def order(*key: int) -> tuple[int, ...]:
        permutation = Permutation(1000, *key)
        return tuple(permutation(i) for i in range(50))

    keys = [(seed, epoch) for seed in range(5) for epoch in range(5)]
    assert len({order(*key) for key in keys}) == len(keys)
    assert order(1, 2) == order(1, 2)
    assert order(1, 23) != order(12, 3)


def test_samples_cover_the_stream_once_each_epoch(prefix):
    dataset = PackedDataset(prefix, seq_length=10, seed=3)
    assert (dataset.num_samples, dataset.num_unused_tokens) == (100, 3)
    epochs = [[tuple(dataset.tokens(epoch * 100 + i)) for i in range(100)] for epoch in range(3)]
    pieces = [tuple(range(10 * i, 10 * i + 10)) for i in range(100)]
    for epoch in epochs:
        assert sorted(epoch) == pieces and epoch != pieces
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    other = PackedDataset(prefix, seq_length=10, seed=4)
    assert [tuple(other.tokens(i)) for i in range(100)] != epochs[0]


def test_a_sample_depends_on_its_index_alone(prefix):
    backwards = PackedDataset(prefix, seq_length=10, seed=3)
    late = {i: backwards.tokens(i).tolist() for i in reversed(range(250))}
    forwards = PackedDataset(prefix, seq_length=10, seed=3)
    assert all(forwards.tokens(i).tolist() == late[i] for i in range(250))
    assert forwards.tokens(10**12).shape == (10,)


def test_validation_is_in_order_and_wraps(prefix):
    dataset = PackedDataset(prefix, seq_length=10, shuffle=False)
    assert dataset.tokens(0).tolist() == list(range(10)) == dataset.tokens(100).tolist()
    assert dataset.tokens(99).tolist() == list(range(990, 1000))
    assert dataset.tokens(0).dtype == np.int64


def test_samples_may_be_changed_by_their_receiver(prefix):
    dataset = PackedDataset(prefix, seq_length=10, shuffle=False)
    dataset.tokens(0)[:] = -1
    assert dataset.tokens(0).tolist() == list(range(10))


def test_too_few_tokens_for_one_sample(prefix):
    assert PackedDataset(prefix, seq_length=1003).num_samples == 1
    with pytest.raises(UserError, match="1003 tokens do not fill one sample of --seq-length 1004"):
        PackedDataset(prefix, seq_length=1004)
    with pytest.raises(IndexError):
        PackedDataset(prefix, seq_length=10).tokens(-1)
