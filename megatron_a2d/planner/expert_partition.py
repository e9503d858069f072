"""Partition of a layer's experts over expert-parallel ranks: equal numbers of experts, and loads as even as possible.

A step waits for its busiest rank, so what is minimised is the mean over batches of the busiest rank's load over the
mean: experts that are busy at the same time belong on different ranks. The mean load alone does not show that.

Greedy first: the largest load to the least loaded rank that has room (longest processing time first: Graham, "Bounds on
Multiprocessing Timing Anomalies", 1969). Then pairs of experts change places between two ranks, the best pair first,
while that helps (Kernighan and Lin, "An Efficient Heuristic Procedure for Partitioning Graphs", 1970). Deterministic.

Shapes: B batches, E experts, R ranks, n = E / R experts of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_LEAST_GAIN = 1e-12  # of the objective: rounding is no improvement
_MAX_SWEEPS = 100


class Imbalance(NamedTuple):
    """Busiest rank's tokens over the mean, of a layer: mean over batches, and of all batches together."""

    all: float
    masked: float
    unmasked: float
    together: float  # all tokens


class Change(NamedTuple):
    """Imbalance before and after placement."""

    before: Imbalance
    after: Imbalance


class Placed(NamedTuple):
    """The placement of all layers, and its evaluation on held-out batches."""

    order: list[list[int]]  # [layers][slots]
    layers: list[Change]

    @property
    def mean(self) -> Change:
        return self._over_layers(np.mean)

    @property
    def worst(self) -> Change:
        return self._over_layers(np.max)

    def _over_layers(self, reduce: Callable[..., np.ndarray]) -> Change:
        before, after = (
            Imbalance(*reduce(np.array(values), axis=0).tolist()) for values in zip(*self.layers, strict=True)
        )
        return Change(before, after)


def batches_of_ranks(choices_ULKE: np.ndarray, size: int) -> np.ndarray:
    """[B, L, K, E] choices of batches, each of `size` ranks' consecutive micro-batches."""
    count = len(choices_ULKE) // size
    return choices_ULKE[: count * size].reshape(count, size, *choices_ULKE.shape[1:]).sum(1)


def place_layers(used_BLKE: np.ndarray, held_out_BLKE: np.ndarray, size: int) -> Placed:
    """Place the experts of L layers by the choices in the batches `used`, evaluated on those that are held out.

    K = 2 kinds of token: unmasked, masked. Layers have different busiest ranks, so that the activations of all layers
    together are even as well.
    """
    order, layers, totals_R = [], [], np.zeros(size)
    for used_BKE, held_out_BKE in zip(np.moveaxis(used_BLKE, 1, 0), np.moveaxis(held_out_BLKE, 1, 0), strict=True):
        used_BE = used_BKE.sum(1)
        ranks_Rn = np.array(place(used_BE, size)).reshape(size, -1)
        loads_R = _group_loads(used_BE, ranks_Rn).sum(0)
        ranks = _spread(np.arange(size), loads_R, totals_R)
        totals_R += loads_R[ranks]
        order.append(ranks_Rn[ranks].reshape(-1).tolist())
        as_it_is = list(range(used_BE.shape[-1]))
        layers.append(Change(_evaluate(held_out_BKE, as_it_is, size), _evaluate(held_out_BKE, order[-1], size)))
    return Placed(order, layers)


def _evaluate(batches_BKE: np.ndarray, order: list[int], size: int) -> Imbalance:
    all_BE = batches_BKE.sum(1)
    kinds = (all_BE, batches_BKE[:, 1], batches_BKE[:, 0], all_BE.sum(0, keepdims=True))
    return Imbalance(*(imbalance(loads, order, size) for loads in kinds))


def imbalance(loads_BE: np.ndarray, order: np.ndarray | list[int], size: int) -> float:
    """Busiest rank's load over the mean, mean over batches, for the experts `order` [E] laid out over `size` ranks."""
    ranks_BR = np.asarray(loads_BE, dtype=np.float64)[:, np.asarray(order)].reshape(len(loads_BE), size, -1).sum(-1)
    means_B = ranks_BR.mean(-1)
    busy = means_B > 0
    return float((ranks_BR.max(-1)[busy] / means_B[busy]).mean()) if busy.any() else 1.0


def place(loads_BE: np.ndarray, size: int) -> list[int]:
    """The expert in each slot, [E]: rank r of `size` holds slots r E / size and on.

    Other numbers of ranks are served as well as that one allows: neighbouring ranks are those that together are even,
    should they become one, and so are the parts of a rank, should it be divided.
    """
    loads_BE = np.asarray(loads_BE, dtype=np.float64)
    ranks_Rn = partition(loads_BE, size)
    ranks_Rn = ranks_Rn[_coarser(_group_loads(loads_BE, ranks_Rn))]
    return [int(expert) for experts in ranks_Rn for expert in experts[_finer(loads_BE[:, experts])]]


def partition(loads_BE: np.ndarray, size: int) -> np.ndarray:
    """The experts of each of `size` ranks, [R, n]."""
    loads_BE = np.asarray(loads_BE, dtype=np.float64)
    if loads_BE.shape[1] % size:
        raise ValueError(f"{loads_BE.shape[1]} experts cannot be divided evenly over {size} ranks")
    totals_B1 = loads_BE.sum(1, keepdims=True)
    shares_BE = np.divide(loads_BE, totals_B1, out=np.zeros_like(loads_BE), where=totals_B1 > 0) * size
    ranks_Rn = _greedy(shares_BE.sum(0), size)
    return ranks_Rn if size == 1 or ranks_Rn.shape[1] == 1 else _swap(shares_BE, ranks_Rn)


def _greedy(loads_E: np.ndarray, size: int) -> np.ndarray:
    room = np.full(size, len(loads_E) // size)
    totals, ranks = np.zeros(size), [[] for _ in range(size)]  # type: ignore[var-annotated]
    for expert in np.argsort(-loads_E, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, totals, np.inf)))
        ranks[rank].append(int(expert))
        totals[rank] += loads_E[expert]
        room[rank] -= 1
    return np.array(ranks)


def _swap(shares_BE: np.ndarray, ranks_Rn: np.ndarray) -> np.ndarray:
    """Ranks after swaps between every two of them, until no swap helps. A balanced batch's loads are 1 on each rank."""
    ranks_Rn, size = ranks_Rn.copy(), len(ranks_Rn)
    loads_BR = _group_loads(shares_BE, ranks_Rn)
    for _ in range(_MAX_SWEEPS):
        swapped = False
        for a in range(size):
            for b in range(a + 1, size):
                others_B11 = np.delete(loads_BR, (a, b), axis=1).max(1, initial=0)[:, None, None]
                # What rank a gains, and b loses, if the i-th expert of a and the j-th of b change places.
                moved_Bnn = shares_BE[:, None, ranks_Rn[b]] - shares_BE[:, ranks_Rn[a], None]
                a_B11, b_B11 = loads_BR[:, a, None, None], loads_BR[:, b, None, None]
                busiest_Bnn = np.maximum(np.maximum(a_B11 + moved_Bnn, b_B11 - moved_Bnn), others_B11)
                after_nn = busiest_Bnn.mean(0)
                i, j = np.unravel_index(np.argmin(after_nn), after_nn.shape)
                if after_nn[i, j] < loads_BR.max(1).mean() - _LEAST_GAIN:
                    ranks_Rn[a, i], ranks_Rn[b, j] = ranks_Rn[b, j], ranks_Rn[a, i]
                    loads_BR[:, a] += moved_Bnn[:, i, j]
                    loads_BR[:, b] -= moved_Bnn[:, i, j]
                    swapped = True
        if not swapped:
            break
    return ranks_Rn


def _coarser(loads_BR: np.ndarray) -> np.ndarray:
    """The order of the ranks, [R], in which neighbours are even together, by prime factors of their number."""
    size = loads_BR.shape[1]
    if size == 1:
        return np.arange(1)
    groups = partition(loads_BR, size // _least_factor(size))
    return groups[_coarser(_group_loads(loads_BR, groups))].reshape(-1)


def _finer(loads_Bn: np.ndarray) -> np.ndarray:
    """The order of a rank's experts, [n], whose halves (by prime factors) are even."""
    count = loads_Bn.shape[1]
    if count == 1:
        return np.arange(1)
    parts = partition(loads_Bn, _least_factor(count))
    return np.concatenate([part[_finer(loads_Bn[:, part])] for part in parts])


def _spread(ranks: np.ndarray, loads_R: np.ndarray, totals_R: np.ndarray) -> np.ndarray:
    """`ranks` in the order in which the busy ones come where `totals_R` is small, neighbours of `_coarser` together."""
    if len(ranks) == 1:
        return ranks
    parts = len(ranks)
    while parts > (factor := _least_factor(parts)):  # `_coarser` takes the largest factor last
        parts //= factor
    blocks, places = ranks.reshape(parts, -1), np.arange(len(ranks)).reshape(parts, -1)
    result = np.empty_like(ranks)
    busiest_first = np.argsort(-loads_R[blocks].sum(1), kind="stable")
    emptiest_first = np.argsort(totals_R[places].sum(1), kind="stable")
    for block, place in zip(busiest_first, emptiest_first, strict=True):
        result[places[place]] = _spread(blocks[block], loads_R, totals_R[places[place]])
    return result


def _least_factor(number: int) -> int:
    return next(factor for factor in range(2, number + 1) if number % factor == 0)


def _group_loads(loads_BE: np.ndarray, groups_Rn: np.ndarray) -> np.ndarray:
    """[B, R]"""
    return loads_BE[:, groups_Rn].sum(-1)
