"""Loads of experts, as a study measured them: imbalance by kind of token and layer, dead experts, and load by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_a2d.planner.expert_partition import place


@dataclass(frozen=True)
class Loads:
    """Choices of experts on held-out text at one checkpoint; L layers, E experts."""

    iteration: int
    choices: dict[str, np.ndarray]  # kind of token: [L, E] counts
    entropy: dict[str, float]  # of a token's distribution over experts, nats, mean over layers

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Loads:
        """From an entry of router_loads.py's results."""
        return cls(
            entry["iteration"],
            {kind: np.array(counts, dtype=np.int64) for kind, counts in entry["choices"].items()},
            {kind: float(np.mean(values)) for kind, values in entry["entropy"].items()},
        )

    @property
    def total(self) -> np.ndarray:
        """[L, E] choices of both kinds."""
        return np.sum(list(self.choices.values()), axis=0)

    @property
    def num_dead(self) -> int:
        """Experts that no token chose, over all layers."""
        return int((self.total == 0).sum())

    def imbalance(self, kind: str) -> np.ndarray:
        """[L] load of the busiest expert over the mean."""
        return busiest(self.choices[kind])

    def ranks(self, num_ranks: int, placed_by: Loads | None = None) -> np.ndarray:
        """[L] load of the busiest of `num_ranks` expert-parallel ranks over the mean.

        The experts lie in their order, or are placed by the loads `placed_by`.
        """
        loads_LE = self.total
        if placed_by is not None:
            orders = [place(known_E[None], num_ranks) for known_E in placed_by.total]
            loads_LE = np.take_along_axis(loads_LE, np.array(orders), axis=1)
        return busiest(loads_LE.reshape(len(loads_LE), num_ranks, -1).sum(-1))


def busiest(loads_LN: np.ndarray) -> np.ndarray:
    """[L] largest load of each row over the row's mean; 1 for a row without any."""
    means_L = loads_LN.mean(-1)
    return np.where(means_L > 0, loads_LN.max(-1) / np.maximum(means_L, 1e-12), 1.0)


def rank_sizes(num_experts: int, largest: int = 8) -> list[int]:
    """Expert-parallel sizes 2, 4, ... that divide the experts."""
    return [size for size in (2**power for power in range(1, 20)) if size <= largest and num_experts % size == 0]
