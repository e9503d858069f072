"""Experts over ranks: equal numbers, even loads, and near the best of all partitions where those can be counted."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from megatron_a2d.planner.expert_partition import Placed, batches_of_ranks, imbalance, partition, place, place_layers


def partitions(experts: list[int], size: int) -> list[list[int]]:
    """Every way to fill ranks of `size` experts, as orders."""
    if not experts:
        return [[]]
    first, *others = experts
    found = []
    for rest in combinations(others, size - 1):
        left = [expert for expert in others if expert not in rest]
        found += [[first, *rest, *order] for order in partitions(left, size)]
    return found


def placed_by(choices: np.ndarray, size: int) -> Placed:
    """By every other batch, evaluated on the remaining ones."""
    batches = batches_of_ranks(choices, size)
    return place_layers(batches[0::2], batches[1::2], size)


def skewed(seed: int, batches: int = 12, experts: int = 8) -> np.ndarray:
    """Loads of a few busy experts, some of them busy at late times only."""
    draw = np.random.default_rng(seed)
    visible, masked = draw.gamma(0.5, 1, (2, experts))
    times = draw.uniform(0, 1, (batches, 1))
    return (1 - times) * visible + times * masked


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_near_the_best_of_all(size: int, seed: int) -> None:
    loads = skewed(seed)
    best = min(imbalance(loads, order, size) for order in partitions(list(range(8)), 8 // size))
    order = place(loads, size)
    assert sorted(order) == list(range(8))
    assert best - 1e-9 <= imbalance(loads, order, size) <= 1.02 * best
    assert order == place(loads, size)


def test_imbalance_is_the_mean_over_batches() -> None:
    loads = [[3, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]  # 2, 1, and a batch without tokens
    assert imbalance(np.array(loads), [0, 1, 2, 3], 2) == 1.5
    assert imbalance(np.array(loads), [0, 2, 3, 1], 2) == (1.5 + 1) / 2
    assert imbalance(np.zeros((3, 4)), [0, 1, 2, 3], 2) == 1


def test_experts_that_are_busy_together_are_apart() -> None:
    """All have the same mean, by which experts 0 and 2 would share a rank: greedy placement alone does that."""
    loads = np.array([[1, 0, 1, 0], [0, 1, 0, 1]])
    assert imbalance(loads, [0, 2, 1, 3], 2) == 2
    assert imbalance(loads, partition(loads, 2).ravel(), 2) == 1


def test_greedy_where_a_swap_is_needed() -> None:
    loads = np.array([[8, 7, 6, 5, 4, 0]])  # greedily 8 + 5 + 4 and 7 + 6 + 0
    assert imbalance(loads, place(loads, 2), 2) == 1


def test_other_numbers_of_ranks_are_served_too() -> None:
    """Neighbours of four ranks are even as two, and halves of two ranks as four."""
    four = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert imbalance(four, place(four, 4), 2) == 1
    eight = np.array([[4.0, 4, 3, 3, 2, 2, 1, 1]])
    assert imbalance(eight, place(eight, 2), 2) == 1
    assert imbalance(eight, place(eight, 2), 4) == 1
    six = np.array([[6.0, 5, 4, 3, 2, 1]])
    assert imbalance(six, place(six, 6), 3) == 1


def test_ranks_are_of_equal_size() -> None:
    assert partition(np.array([[100.0, 1, 1, 1, 1, 1]]), 3).shape == (3, 2)
    with pytest.raises(ValueError, match="6 experts"):
        partition(np.ones((1, 6)), 4)


def test_what_is_reported_was_not_used() -> None:
    """The batches by which experts are placed are balanced by that, the others are of another kind."""
    used, reported = [[3, 3], [1, 1], [0, 0], [0, 0]], [[0, 0], [1, 0], [3, 3], [0, 2]]
    choices = np.array([used, used, reported, reported]).transpose(0, 2, 1)[
        :, None
    ]  # [micro-batches, layer, kind, expert]
    placed = placed_by(choices, 2)
    (layer,) = placed.layers
    assert imbalance(np.array([[6.0, 2, 0, 0]]), placed.order[0], 2) == 1.5  # the best for what was used
    shares = {expert: load for expert, load in enumerate([0, 1, 6, 2])}
    ranks = [sum(shares[expert] for expert in placed.order[0][half]) for half in (slice(2), slice(2, 4))]
    assert layer.after.all == max(ranks) / 4.5 and layer.before.all == 8 / 4.5
    assert layer.before.unmasked == 2 * 3 / 4 and layer.before.masked == 2
    assert placed.mean == placed.worst == layer


def test_layers_have_different_busiest_ranks() -> None:
    """Eight layers of the same loads: their sum is even over ranks, and each is placed as well as alone."""
    loads = np.array([8, 1, 1, 1, 4, 2, 1, 1])
    choices = np.zeros((16, 8, 2, 8), dtype=int)
    choices[:, :, 0] = loads
    for size in (2, 4, 8):
        placed = placed_by(choices, size)
        ranks_LR = np.array([loads[order].reshape(size, -1).sum(1) for order in placed.order])
        assert (ranks_LR.max(1) == loads[place(loads[None], size)].reshape(size, -1).sum(1).max()).all()
        assert np.ptp(ranks_LR.sum(0)) <= ranks_LR.max()
        pairs_LR = ranks_LR.reshape(8, -1, 2).sum(2)  # neighbours are still those of half as many ranks
        assert (pairs_LR.max(1) == imbalance(loads[None], place(loads[None], size), size // 2 or 1) * 38 / size).all()


def test_batches_are_those_of_the_ranks_together() -> None:
    """Two ranks' micro-batches that balance one another are a balanced batch."""
    one, other = [[2, 0], [0, 0]], [[0, 2], [0, 0]]
    choices = np.array([one, other] * 4)[:, None]
    assert placed_by(choices, 2).layers[0].before.all == 1
